"""Embeddings of texts: tokens, hidden states, pooling."""
