"""Long work as a person sees it: a bar with tokens a second and the time that is left, and a way to stop."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class TokenBar:
    """Shows how far something is [tokens]."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task, self._begun, self._done = progress, progress.add_task("", visible=False), 0.0, 0

    def begin(self, total: int, what: str) -> None:
        """Say how much there is to do [tokens]."""
        self._begun, self._done = time.monotonic(), 0
        self._progress.reset(self._task, total=total, description=what, visible=total > 0, speed="")

    def advance(self, tokens: int) -> None:
        """Say that so much was done."""
        self._done += tokens
        speed = self._done / max(time.monotonic() - self._begun, 1e-9)
        self._progress.update(self._task, advance=tokens, speed=f"{speed:,.0f} tokens/s")


@contextmanager
def token_bar(shown: bool = True) -> Iterator[TokenBar]:
    """A bar on stderr, from its first ``begin`` to the end of the block."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[speed]}"))  # fmt: skip
    with Progress(*columns, disable=not shown, console=Console(stderr=True)) as progress:
        yield TokenBar(progress)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for a place where work can stop; gives what tells whether it was pressed.

    Pressed twice, it stops at once. Outside the main thread nothing can be deferred, and nobody presses it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
