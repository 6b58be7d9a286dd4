"""Measured parity: compares MLX with PyTorch, relative to the rounding error of PyTorch. Imports no framework.

yardstick   the criterion: error of MLX over noise of PyTorch, both relative to PyTorch in float64
trace       the arrays that a run computes, in order
align       which axes of MLX and PyTorch correspond
locate      comparison of traces; the layers at which a difference begins
report      tables, verdict, JSON
engines     the three engines of a parity run: build, record, replay
run         the parity run of a configuration
modules     the comparison of an MLX module with its PyTorch twin, without a configuration
texts       comparison of generated texts
"""
