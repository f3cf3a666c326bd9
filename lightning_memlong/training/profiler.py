"""What the parts of a training step cost, measured where Lightning and the memory say they begin and end."""

import time
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler

PARTS = {
    "train_dataloader_next": "data",
    ".training_step": "forward",
    ".backward": "backward",
    "memory.retriever": "retriever",
    "memory.search": "search",
    "memory.gather": "gather",
    "memory.insert": "insert",
}
"""End of an action's name -> part of a step. Others are not measured."""


class StepProfiler(Profiler):
    """Milliseconds of the parts of a training step, for the dashboard: cheap enough to be always on.

    On a GPU forward and backward are timed by events on the device, which nothing waits for until :meth:`take`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._named: dict[str, str | None] = {}
        self._open: dict[str, Any] = {}
        self._spent: dict[str, list[tuple[Any, Any]]] = {}

    def start(self, action_name: str) -> None:
        """Note that an action begins."""
        if (part := self._part(action_name)) is not None:
            self._open[part] = _now(part)

    def stop(self, action_name: str) -> None:
        """Note that it has ended."""
        if (part := self._part(action_name)) is not None and part in self._open:
            self._spent.setdefault(part, []).append((self._open.pop(part), _now(part)))

    def _part(self, action: str) -> str | None:
        if action not in self._named:
            strategy = action.startswith(("[Strategy]", "[_TrainingEpochLoop]", "memory."))
            self._named[action] = next((p for end, p in PARTS.items() if strategy and action.endswith(end)), None)
        return self._named[action]

    def take(self, steps: int) -> dict[str, float]:
        """Milliseconds a step of each part since this was last called, in which there were so many steps."""
        spent, self._spent = self._spent, {}
        return {part: sum(_between(*marks) for marks in found) / steps for part, found in spent.items()}


def _now(part: str) -> Any:
    if part in ("forward", "backward") and torch.cuda.is_available() and torch.cuda.is_initialized():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def _between(begin: Any, end: Any) -> float:
    """Milliseconds."""
    if isinstance(begin, float):
        return 1000 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)
