"""Models without a framework: the base class, initial values, dropout keys, padded shapes for compiled functions."""
