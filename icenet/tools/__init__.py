"""Tools of this backend for the commands: recording and replaying modules, benchmarks, `icenet doctor`."""
