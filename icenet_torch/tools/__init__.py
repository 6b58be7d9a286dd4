"""Tools of this backend for the commands: recording and replaying modules, benchmarks, `icenet doctor`.

`state_dict` reads and writes PyTorch state dicts and has no counterpart in MLX.
"""
