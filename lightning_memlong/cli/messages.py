"""What is said beside results: our log lines without others' noise, and mistakes without a traceback."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.logging import RichHandler

from lightning_memlong.errors import UserError

CANNOT_WRITE = (28, 27, 30, 13)
"""Numbers of system errors: no space, too large, read-only, not permitted."""
DOES_NOT_APPLY = (
    ".*does not have many workers.*",
    ".*module.s. in eval mode.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`IterableDataset` has `__len__` defined.*",
    # It is: the position is part of the DataModule's state.
    ".*your dataloader is not resumable.*",
    # Perplexities are already those of all processes; the bank's numbers are those of the first.
    ".*sync_dist=True.*",
    ".*args parameter is intended to run from within Python.*",
)
"""Warnings that are not shown."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Our own log lines, and no advice that does not apply here."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)], force=True)
    logging.getLogger("lightning_memlong").setLevel(logging.INFO)
    for name in ("faiss.loader", "httpx", "sentence_transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addFilter(lambda record: "Tip:" not in record.getMessage())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with warnings.catch_warnings():
        for message in DOES_NOT_APPLY:
            warnings.filterwarnings("ignore", message=message)
        yield


def find_user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind an error, if there is one: the parser wraps what constructors raise."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def exit_status(run: Callable[[], object]) -> int:
    """Run something.

    Returns:
        0, or 2 after a mistake that a person can fix, told without a traceback.
    """
    try:
        run()
    except ValueError as error:
        told = find_user_error(error)
        if told is None:
            raise
        sys.stderr.write(f"error: {told}\n")
        return 2
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        sys.stderr.write(
            f"error: cannot write {error.filename or 'a file'}: {error.strerror}. Allowed: a writable folder with "
            "free space. Fix: free some, or choose another with --trainer.logger.save_dir.\n"
        )
        return 2
    return 0
