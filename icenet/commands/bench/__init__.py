"""`icenet bench`: what things cost here, measured. Each measurement has a process of its own."""
