"""Images as training batches: files, augmentation, batches."""
