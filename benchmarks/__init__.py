"""How fast a DNC trains here and elsewhere, side by side: `python -m benchmarks --help`."""
