"""The PyTorch engine: build, engine, optimizers, weight average, process group."""
