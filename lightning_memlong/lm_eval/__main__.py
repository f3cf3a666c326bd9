"""``memlong lm-eval``: lm-eval's own command line, which now knows ``--model memlong``."""

import sys

from lm_eval.__main__ import cli_evaluate

from lightning_memlong.cli.messages import exit_status, quiet_libraries
from lightning_memlong.lm_eval import MemLongLM


def main(arguments: list[str]) -> int:
    """Run lm-eval, which takes its arguments from the process.

    Returns:
        As :func:`lightning_memlong.cli.messages.exit_status`.
    """
    assert MemLongLM is not None  # registered by its import
    sys.argv = [sys.argv[0], *arguments]
    with quiet_libraries():
        return exit_status(cli_evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
