"""Passes over the record of a graph, before it is written: no operations in place, whole layers, axes in memory."""
