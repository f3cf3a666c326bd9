"""``python -m lightning_memlong.sweep``."""

import signal
import sys

from lightning_memlong.sweep.command import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # a run is then told to stop, too
    sys.exit(main())
