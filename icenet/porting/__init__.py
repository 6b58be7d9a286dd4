"""Loads ported modules, and holds the MLX functions whose source the ports copy."""
