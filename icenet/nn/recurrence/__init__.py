"""The loops over time of the recurrent layers, MLX, and what computes them faster than a loop of operations.

`loops` has the loops with their gradients. They call `kernels` on a GPU (with `source`, the text of the kernels, and
`tiles`, how a launch divides the units) and `host` on a Linux CPU. PyTorch has functions for whole sequences.
"""
