"""Training: the engine, its optimizers, averages and process group."""
