"""``python -m dnc_triton``."""

import sys

from dnc_triton.cli import main

sys.exit(main())
