"""Generation on the device: the decoder and its cache."""
