"""Ports of PyTorch modules, and the comparison of each with its original."""
