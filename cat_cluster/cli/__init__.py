"""The command line: commands, progress bars, tables and the demo."""
