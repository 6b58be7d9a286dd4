"""The MLX engine: build, engine, optimizers, weight average, process group."""
