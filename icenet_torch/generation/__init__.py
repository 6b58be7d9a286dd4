"""Text generation on PyTorch: the decoder, its sampling steps and its caches."""
