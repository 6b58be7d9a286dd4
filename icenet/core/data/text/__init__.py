"""Text as training batches: sources, the token cache, packed sequences and single documents."""
