"""Copies between a GPU and the machine's memory that nobody waits for: in a thread, on a stream, of their own."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
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
        self._begin()

    def _begin(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[Any]] = deque()
        self._giving, self._process = Lock(), os.getpid()
        self._failed: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()  # another process has a line of its own

    def ask(self, work: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Let something be done once all before it is; what goes wrong comes with the future."""
        return self._submit(self._unless_failed, work, *arguments)

    def leave(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Let something be done of which nobody waits for the end; if it goes wrong, nothing after it is done."""
        self.check()
        self._submit(self._or_fail, work, *arguments)

    def check(self) -> None:
        """Raise what went wrong with something that was left here."""
        if self._failed is not None:
            raise self._failed

    def settle(self) -> None:
        """Wait until all is done, and :meth:`check`."""
        if self._process == os.getpid():
            wait(self._waiting)
        self.check()

    def _submit(self, work: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        if self._process != os.getpid():
            self._begin()  # a forked process has not the thread
        with self._giving:
            while self._waiting and (self._waiting[0].done() or len(self._waiting) >= WAITING):
                wait([self._waiting[0]])
                self._waiting.popleft()
            self._thread = self._thread or ThreadPoolExecutor(1, "memory-bank")
            # A mode belongs to its thread, and what was allocated in inference mode is written in that only.
            future = self._thread.submit(_in_mode, torch.is_inference_mode_enabled(), work, *arguments)
            self._waiting.append(future)
            return future

    def _unless_failed(self, work: Callable[..., Result], *arguments: Any) -> Result:
        self.check()
        return work(*arguments)

    def _or_fail(self, work: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._unless_failed(work, *arguments)
        except BaseException as error:
            self._failed = error
            raise


def _in_mode(inference: bool, work: Callable[..., Result], *arguments: Any) -> Result:
    with torch.inference_mode(inference), torch.no_grad():
        return work(*arguments)


class Arriving:
    """Tensors that a stream is still filling.

    Args:
        tensors: Where they are written.
        device: Where they are wanted.
        stream: What writes them; None: they are there.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, stream: "torch.cuda.Stream | None") -> None:
        self._tensors, self._device = tensors, device
        self._written = None if stream is None else stream.record_event()

    def on_device(self) -> Sequence[Tensor]:
        """The tensors, for the device: what it is told from here on sees them filled."""
        if self._written is None:
            return [t.to(self._device) for t in self._tensors]
        asking = torch.cuda.current_stream(self._device)
        asking.wait_event(self._written)
        for tensor in self._tensors:  # its room belongs to the other stream, which is not to give it away meanwhile
            tensor.record_stream(asking)
        return self._tensors

    def on_host(self) -> Sequence[Tensor]:
        """The tensors, for the host, which waits."""
        if self._written is not None:
            with torch.cuda.device(self._device):  # a thread's own is the first card, which is not to be woken for this
                self._written.synchronize()
        return self._tensors


class Transfer:
    """Copies between a device and the machine's memory; on a GPU, by a stream of their own.

    Args:
        device: The other side.
        purpose: Who copies; a stream is shared by all of one device and purpose, since PyTorch keeps room by stream.
    """

    def __init__(self, device: torch.device, purpose: str) -> None:
        self.device, self.purpose = device, purpose

    @property
    def stream(self) -> "torch.cuda.Stream | None":
        """The stream; None where the device has none."""
        return _stream_of(self.device, self.purpose) if self.device.type == "cuda" else None

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Within it, the device is told things on the stream."""
        if (stream := self.stream) is None:
            yield
        else:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                yield

    def follow(self) -> None:
        """Let what comes next on the stream see all that the device was told until now."""
        if (stream := self.stream) is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))

    def to_host(self, tensors: Sequence[Tensor]) -> Arriving:
        """Bring tensors of the device, as they are once what it was told is done; it may go on meanwhile."""
        if (stream := self.stream) is None:
            return Arriving([t.cpu() for t in tensors], self.device, None)
        self.follow()
        with self.queue():
            for tensor in tensors:
                tensor.record_stream(stream)
            copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            return Arriving(copies, self.device, stream)

    def pick(self, held: Tensor, dim: int, places: Tensor) -> Tensor:
        """Entries ``places`` of a dimension of what the machine's memory holds; to a GPU, told in :meth:`queue`."""
        if self.stream is None:
            return held.index_select(dim, places)
        shape = [*held.shape[:dim], len(places), *held.shape[dim + 1 :]]
        staged = torch.empty(shape, dtype=held.dtype, pin_memory=True)  # PyTorch keeps it for the next of that size
        return torch.index_select(held, dim, places, out=staged).to(self.device, non_blocking=True)


@cache
def _stream_of(device: torch.device, purpose: str) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)
