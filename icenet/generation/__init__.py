"""Text generation on MLX: the decoder, its sampling steps and its caches."""
