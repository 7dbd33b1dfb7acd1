"""How fast a DNC trains with this project and with others, side by side: `python -m benchmarks --help`."""
