"""``python -m lightning_memlong.sweep``."""

import sys

from lightning_memlong.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
