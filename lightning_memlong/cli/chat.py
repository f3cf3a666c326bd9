"""``python -m lightning_memlong.cli.chat book.txt``: read a document, then talk about it.

Options are those of ``train.py chat``: ``--bank book.safetensors`` keeps what was read for the next time,
``--model.backbone`` and ``--memory.top_k`` are what they are everywhere; without a ``--config`` those of
``conf/memlong.yaml`` hold, where the command is run in a checkout.
"""

import sys
from pathlib import Path

from lightning_memlong.cli.main import main as command_line
from lightning_memlong.cli.parser import config_files

DEFAULTS = Path(__file__).parents[2] / "conf" / "memlong.yaml"


def main(arguments: list[str]) -> int:
    """Run ``train.py chat`` on the document that is named first.

    Returns:
        As :func:`lightning_memlong.cli.main.main`.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data.path", arguments[0], *arguments[1:]]
    if not config_files(arguments):
        defaults = ["--config", str(DEFAULTS)] if DEFAULTS.exists() else ["--data", "datamodules.LocalText"]
        arguments = [*defaults, *arguments]
    return command_line(["chat", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
