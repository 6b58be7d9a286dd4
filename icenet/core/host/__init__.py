"""The computer that a process runs on: its cores, its processor, the memory of its arrays, a fast BLAS."""
