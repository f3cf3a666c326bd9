"""What is said beside results: our log lines without others' noise, and mistakes without a traceback."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.logging import RichHandler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError

OURS = ("callbacks.", "lightning_memlong.")
CANNOT_WRITE = (28, 27, 30, 13)
"""Numbers of system errors: no space, too large, read-only, not permitted."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
ASKED_FOR = (L.Callback, Logger, Profiler, Optimizer, LRScheduler)
"""Kinds of objects that a configuration names by class."""
LIGHTNING_RAISES = (
    MisconfigurationException, ValueError, TypeError, RuntimeError, ModuleNotFoundError, ZeroDivisionError,
)  # fmt: skip
"""What Lightning refuses options with."""
DOES_NOT_APPLY = (
    ".*does not have many workers.*",
    ".*module.s. in eval mode.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`IterableDataset` has `__len__` defined.*",
    # It is: the position is part of the DataModule's state.
    ".*your dataloader is not resumable.*",
    # Perplexities are already those of all processes; the bank's numbers are those of the first.
    ".*sync_dist=True.*",
    # The DataModule has none of its own.
    ".*overridden `on_before_batch_transfer` in `LightningModule`.*",
    ".*args parameter is intended to run from within Python.*",
)
"""Warnings that are not shown."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Our own log lines, and no advice that does not apply here."""
    # On stderr, beside what is piped on; and there is no terminal's edge in a file, where paths would be broken.
    out = Console(stderr=True, width=None if sys.stderr.isatty() else 240)
    handler = RichHandler(console=out, show_path=False, show_time=False)
    logging.basicConfig(format="%(message)s", handlers=[handler], force=True)
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


def describe_mistake(error: BaseException) -> str | None:
    """What to tell a person of an error that is a mistake of theirs; None: it may be one of ours.

    Mistakes are ours to tell (:class:`UserError`), the file system's, Lightning's (what it refuses is raised in its own
    code: options that do not go together, a metric that is not there, a package that a logger needs), or those of a
    class that was asked for, whose constructor refuses its arguments.
    """
    if isinstance(error, ValueError) and (told := find_user_error(error)) is not None:
        return str(told)
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return (
            f"cannot write {error.filename or 'a file'}: {error.strerror}. Allowed: a writable folder with "
            "free space. Fix: free some, or choose another with --trainer.logger.save_dir."
        )
    cause: BaseException | None = error
    while cause is not None:  # the parser wraps what constructors raise
        if (words := _describe(cause)) is not None:
            return words
        cause = cause.__cause__
    return None


def _describe(error: BaseException) -> str | None:
    """What Lightning, or the constructor of a class that was asked for, refuses."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    if isinstance(error, LIGHTNING_RAISES) and module.startswith(("lightning.", "lightning_utilities.")):
        return f"Lightning: {_one_line(error)} Fix: change that option; --debug shows where it was raised."
    built = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "__init__"]
    asked_for = [type(one) for one in built if isinstance(one, ASKED_FOR)]
    ours = any(kind.__module__.startswith(OURS) for kind in asked_for)
    if asked_for and (isinstance(error, TypeError | ValueError) or not ours):
        name = f"{asked_for[0].__module__}.{asked_for[0].__qualname__}"
        return f"{name} refuses its arguments: {_one_line(error)} Fix: correct its init_args; --debug shows where."
    return None


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if words.endswith((".", "!", "`")) else f"{words}."


def exit_status(run: Callable[[], object], debug: bool = False) -> int:
    """Run something.

    Args:
        run: What.
        debug: Whether mistakes are shown with their traceback, too.

    Returns:
        0; 2 after a mistake that a person can fix, told without a traceback; 130 when interrupted.
    """
    try:
        run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning ends so, with status 1
            return INTERRUPTED
        raise
    except Exception as error:
        told = describe_mistake(error)
        if told is None or debug:
            raise
        sys.stderr.write(f"error: {told}\n")
        return 2
    return 0


def program_status(run: Callable[[], int], interrupted: str) -> int:
    """Run a program that has an exit status of its own.

    Args:
        run: What.
        interrupted: Said when a person interrupts it.

    Returns:
        Its own; 2 after a mistake that a person can fix; 130 when interrupted.
    """
    with quiet_libraries():
        try:
            return run()
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        except KeyboardInterrupt:
            say(f"\nInterrupted. {interrupted}")
            return INTERRUPTED
