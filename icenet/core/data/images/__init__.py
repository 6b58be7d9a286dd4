"""Image data: files, augmentation, and batches for training."""
