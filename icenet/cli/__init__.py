"""The command line: click definitions only."""
