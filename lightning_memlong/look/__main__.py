"""``memlong look``, or ``python -m lightning_memlong.look``."""

import sys

from lightning_memlong.look.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
