"""Command line: `main` finds the subcommand, one module each does the work."""
