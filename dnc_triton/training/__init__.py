"""A training run of the command line: its settings, its loop, its learners, what it saves and reports."""
