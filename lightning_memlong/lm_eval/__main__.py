"""``python -m lightning_memlong.lm_eval``: lm-eval's own command line, which now knows ``--model memlong``."""

import sys

from lm_eval.__main__ import cli_evaluate

from lightning_memlong.cli.messages import exit_status, quiet_libraries
from lightning_memlong.lm_eval import MemLongLM

if __name__ == "__main__":
    assert MemLongLM is not None  # registered by its import
    with quiet_libraries():
        sys.exit(exit_status(cli_evaluate))
