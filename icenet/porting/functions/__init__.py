"""MLX functions with PyTorch's meaning. A port contains the source of those that it calls, so they use mlx only."""
