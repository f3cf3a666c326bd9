"""``memlong sweep``, or ``python -m lightning_memlong.sweep``."""

import signal
import sys

from lightning_memlong.sweep import command


def main(arguments: list[str]) -> int:
    """Run the command as a process of its own.

    Returns:
        As :func:`lightning_memlong.sweep.command.main`.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # a run is then told to stop, too
    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
