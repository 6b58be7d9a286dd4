"""Ports of PyTorch modules to MLX: the record of a graph, the table of operations, and the writer of the source."""
