"""`icenet bench`: measurements of memory and speed. Each runs in a separate process per backend."""
