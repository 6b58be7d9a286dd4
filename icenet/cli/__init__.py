"""The command line: definitions of commands, arguments and options. Their work is in `icenet.commands`."""
