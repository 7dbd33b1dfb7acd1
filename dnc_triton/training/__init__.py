"""A run of the command line: its settings, its loop, what learns, what is kept and shown."""
