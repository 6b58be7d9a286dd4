"""The layers of `torch.nn` that a port keeps as one layer, of `mlx.nn` or as a class with PyTorch's parameters."""
