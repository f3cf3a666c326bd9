"""``python -m lightning_memlong.lm_eval``: lm-eval's own command line, which now knows ``--model memlong``."""

import sys

from lm_eval.__main__ import cli_evaluate

from lightning_memlong.cli.messages import exit_status, quiet_libraries
from lightning_memlong.lm_eval import MemLongLM, tasks_with_our_tokenizers


def run() -> None:
    """Run it; tasks that make documents take the model's own tokenizer."""
    assert MemLongLM is not None  # registered by its import
    with tasks_with_our_tokenizers():
        cli_evaluate()


if __name__ == "__main__":
    with quiet_libraries():
        sys.exit(exit_status(run))
