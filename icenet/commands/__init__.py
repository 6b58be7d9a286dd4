"""What each subcommand of `icenet` does; the command line itself is `icenet.cli`."""
