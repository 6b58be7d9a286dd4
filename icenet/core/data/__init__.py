"""Data sets of text and images. Batches are numpy arrays and a pure function of (seed, step)."""
