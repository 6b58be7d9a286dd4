"""Reports of a run: progress, metrics, TensorBoard files and plots."""
