"""What a run reports: progress, metrics, TensorBoard files, plots."""
