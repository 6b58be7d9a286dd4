"""The work of each subcommand of `icenet`, one module per subcommand. The command line is in `icenet.cli`."""
