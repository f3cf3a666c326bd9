"""Copies between a GPU and the machine's memory that nobody waits for: in a thread, on a stream, of their own."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WAITING = 4
"""Pieces of work that may wait in a line; what they are to copy is held until then."""


class Line:
    """Work that is done in the order it was given, beside whoever gives it."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[Any]] = deque()
        self._giving = Lock()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # another process has a line of its own

    def give(self, work: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Let something be done once all before it is; raises what went wrong with one of those."""
        with self._giving:
            while self._waiting and (self._waiting[0].done() or len(self._waiting) >= WAITING):
                self._waiting.popleft().result()
            self._thread = self._thread or ThreadPoolExecutor(1, "memory-bank")
            # A mode belongs to its thread, and what was allocated in inference mode is written in that only.
            future = self._thread.submit(_in_mode, torch.is_inference_mode_enabled(), work, *arguments)
            self._waiting.append(future)
            return future

    def settle(self) -> None:
        """Wait until all is done; raises what went wrong."""
        with self._giving:
            while self._waiting:
                self._waiting.popleft().result()


def _in_mode(inference: bool, work: Callable[..., Result], *arguments: Any) -> Result:
    with torch.inference_mode(inference), torch.no_grad():
        return work(*arguments)


class Arriving:
    """Tensors that a stream is still filling.

    Args:
        tensors: Where they are written.
        stream: What writes them; None: they are there.
    """

    def __init__(self, tensors: Sequence[Tensor], stream: "torch.cuda.Stream | None") -> None:
        self._tensors = tensors
        self._written = None if stream is None else stream.record_event()

    def on_device(self) -> Sequence[Tensor]:
        """The tensors, for the device: what it is told from here on sees them filled."""
        if self._written is not None:
            asking = torch.cuda.current_stream(self._tensors[0].device)
            asking.wait_event(self._written)
            for tensor in self._tensors:  # its room belongs to the other stream, which is not to give it away meanwhile
                tensor.record_stream(asking)
        return self._tensors

    def on_host(self) -> Sequence[Tensor]:
        """The tensors, for the host, which waits."""
        if self._written is not None:
            self._written.synchronize()
        return self._tensors


class Transfer:
    """A stream of copies between a device and the machine's memory; for the CPU, which has no streams, none.

    Args:
        device: The other side.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stream": None}

    @property
    def stream(self) -> "torch.cuda.Stream | None":
        """The stream, made when it is first needed."""
        if self._stream is None and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    def queue(self) -> AbstractContextManager[Any]:
        """Within it, the device is told things on the stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follow(self) -> None:
        """Let what comes next on the stream see all that the device was told until now."""
        if (stream := self.stream) is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))

    def to_host(self, tensors: Sequence[Tensor]) -> Arriving:
        """Bring tensors of the device, as they are once what it was told is done; it may go on meanwhile."""
        if (stream := self.stream) is None:
            return Arriving(tensors, None)
        self.follow()
        with torch.cuda.stream(stream):
            for tensor in tensors:
                tensor.record_stream(stream)
            return Arriving([_pinned(t.shape, t.dtype).copy_(t, non_blocking=True) for t in tensors], stream)

    def pick(self, held: Tensor, dim: int, places: Tensor) -> Tensor:
        """Entries ``places`` of a dimension of what the machine's memory holds, on their way; within :meth:`queue`."""
        if self.device.type == "cpu":
            return held.index_select(dim, places)
        shape = [*held.shape[:dim], len(places), *held.shape[dim + 1 :]]
        staged = torch.index_select(held, dim, places, out=_pinned(shape, held.dtype, self.device))
        return staged.to(self.device, non_blocking=True)


def _pinned(shape: Sequence[int], dtype: torch.dtype, device: torch.device = torch.device("cuda")) -> Tensor:  # noqa: B008
    """Room that the device reaches without the host's help; PyTorch keeps it for the next copy of that size."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
