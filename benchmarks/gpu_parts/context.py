"""What a part is given: where it runs, how large, how long; and what it gives: rows."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """A number that was measured, or why there is none."""

    what: str
    value: float | None = None
    unit: str = ""
    goal: float | None = None
    most: bool = True
    """Whether the goal is the most there may be; else the least."""
    status: str = "measured"
    """``measured``, ``failed``, ``skipped`` or ``stopped`` (time was over)."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None: there is none, or nothing was measured."""
        if self.goal is None or self.value is None:
            return None
        return self.value <= self.goal if self.most else self.value >= self.goal

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"met": self.met}


class Stopped(Exception):
    """The time of a part is over."""


@dataclass
class Clock:
    """Time that is left for a part [s]."""

    seconds: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until it is over."""
        return self.begun + self.seconds - time.monotonic()

    def check(self) -> None:
        """Raise :class:`Stopped` once the time is over: to be asked between two measurements."""
        if self.left <= 0:
            raise Stopped


@dataclass
class Context:
    """What all parts share."""

    device: torch.device
    tiny: bool
    seed: int
    root: Path
    weights: str | None = None
    text: list[str] = field(default_factory=list)
    clock: Clock = field(default_factory=lambda: Clock(1e9))

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in: bfloat16 on a card; the CPU is there to see that everything runs."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def cuda(self) -> bool:
        """Whether it is a card."""
        return self.device.type == "cuda"


def attempt(context: Context, what: str, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Rows of one measurement; if it fails, a row that says so, and the part goes on with the next.

    Args:
        context: Whose clock is asked first.
        what: Name of the row that tells of a failure.
        measure: Gives the rows.

    Raises:
        Stopped: If the time is over.
        RuntimeError: If the card itself has failed, so that nothing more can be measured in this process.
    """
    context.clock.check()
    try:
        yield from measure()
    except Stopped:
        raise
    except Exception as error:
        yield Row(what, status="failed", note=told(error))
        free(context)
        if context.cuda:
            torch.cuda.synchronize()  # raises if a kernel has brought the whole process down


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def free(context: Context) -> None:
    """Give memory back that nobody holds any more, compiled kernels included."""
    import gc

    gc.collect()
    torch._dynamo.reset()
    if context.cuda:
        torch.cuda.empty_cache()


class PeakMemory:
    """The most memory while a block runs [GB]: of the card; on the CPU of the whole process, from its start."""

    def __init__(self, context: Context) -> None:
        self._cuda, self.gb, self.reserved_gb = context.cuda, 0.0, 0.0

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        from callbacks.throughput import peak_memory_gb

        self.gb = peak_memory_gb()
        self.reserved_gb = torch.cuda.max_memory_reserved() / 1e9 if self._cuda else self.gb
