"""A CUDA card that is not there: its tensors say that they are on it, and lie in the machine's memory.

So on any machine one sees which lines would wait for a card, which would mix tensors of two devices, which look at what
another stream has not written yet, and which at what was not copied to the host yet: that is done when its event is
waited for. All else is done at once, by the CPU's kernels.
"""

import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from lightning_memlong.bank import transfer

CARD = torch.device("cuda:0")
OURS = ("lightning_memlong", "callbacks", "datamodules")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.to.device, aten.to.dtype_layout}
"""In inference mode, those that are otherwise made of others come here as they are."""
COPIES = MOVES | {aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ASKING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""Operations whose result's value or size the host must know."""


class OnCard(Tensor):
    """A tensor on the card; to C++ it is on the CPU, since a build for the CPU alone cannot differentiate any other.

    Types are ignored where it contradicts its class, which is what it is for, and where PyTorch has none.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCard":
        """Wrap what it holds."""
        facts: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device, **facts)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where Python believes it to be."""
        return CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """As for any tensor there."""
        return True

    def record_stream(self, stream: Any) -> None:
        """Room is never given away here."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What C++ would not do, since it takes the tensor to be on the CPU."""
        kwargs = kwargs or {}
        if func is Tensor.cpu or (getattr(func, "__name__", "") == "to" and _to_cpu(*args[1:], **kwargs)):
            return _Back.apply(*args[:1])  # type: ignore[no-untyped-call]
        if func is Tensor.tolist:
            _waits.note("tolist")
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation."""
        return _run(func, args, kwargs or {})


class _Stream:
    """Counts what it is told, and knows how far it has waited for other streams."""

    def __init__(self, device: Any = None) -> None:
        self._copies, self._made = deque[Callable[[], Any]](), 0
        self._telling = threading.Lock()  # more than one thread tells a stream something
        self.told, self.seen = 0, dict[_Stream, int]()

    def tell(self) -> int:
        """One thing more; gives its number."""
        with self._telling:
            self.told += 1
            return self.told

    def copy_later(self, copy: Callable[[], Any]) -> None:
        """Let something be copied once an event after this is waited for."""
        with self._telling:
            self._copies.append(copy)

    def finish(self, count: int) -> None:
        """Make the first so many of all its copies, as far as they are not made yet."""
        with self._telling:
            while self._made < count:
                self._copies.popleft()()
                self._made += 1

    def wait_stream(self, other: "_Stream") -> None:
        """All that the other was told is seen by what comes next."""
        self._see({**other.seen, other: other.told})

    def wait_event(self, event: "_Event") -> None:
        """Likewise, until the event."""
        self._see({**event.seen, event.stream: event.told})

    def _see(self, told: "dict[_Stream, int]") -> None:
        for stream, count in told.items():
            self.seen[stream] = max(count, self.seen.get(stream, 0))

    def record_event(self) -> "_Event":
        """All until now."""
        with self._telling:
            return _Event(self, self.told, dict(self.seen), self._made + len(self._copies))


class _Event(NamedTuple):
    stream: _Stream
    told: int
    seen: dict[_Stream, int]
    copies: int

    def synchronize(self) -> None:
        """Let what was to be copied be there."""
        self.stream.finish(self.copies)


_now, _DEFAULT = threading.local(), _Stream()


def _current_stream(device: Any = None) -> _Stream:
    return getattr(_now, "stream", _DEFAULT)


@contextmanager
def _stream(stream: _Stream) -> Iterator[None]:
    before, _now.stream = _current_stream(), stream
    try:
        yield
    finally:
        _now.stream = before


@contextmanager
def _device(device: Any) -> Iterator[None]:
    yield


_written = dict[int, tuple[_Stream, int]]()
"""Memory -> which stream wrote it last, and as what it did."""


def _check_order(func: Any, tensors: list[Tensor], out: Any) -> None:
    """What another stream writes must have been waited for, before it is looked at."""
    stream = _current_stream()
    for tensor in tensors:
        writer, when = _written.get(_place(tensor), (stream, 0))
        if tensor.numel() and writer is not stream and stream.seen.get(writer, 0) < when:
            raise RuntimeError(f"{func} looks at what another stream may not have written yet: {tensor.shape}")
    told = stream.tell()
    looked_at = {_place(tensor) for tensor in tensors}
    for tensor in tree_flatten(out)[0]:
        if isinstance(tensor, Tensor) and (func._schema.is_mutable or _place(tensor) not in looked_at):
            _written[_place(tensor)] = stream, told


def _place(tensor: Tensor) -> int:
    return (tensor.held if isinstance(tensor, OnCard) else tensor).untyped_storage().data_ptr()


_plain_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """As ``torch.tensor``, which does not ask a mode: made here, and copied there."""
    place = torch.empty(0).device if device is None else device
    with torch._C.DisableTorchFunction():
        made = _plain_tensor(data, **options)
    return made.to(place)


def _garbage(tensor: Tensor) -> None:
    tensor.fill_(77 if not tensor.dtype.is_floating_point else torch.nan)


class _Back(torch.autograd.Function):
    """To the machine's memory."""

    @staticmethod
    def forward(ctx: Any, tensor: OnCard) -> Tensor:
        _waits.note("to the CPU")
        _check_order(aten._to_copy.default, [tensor], None)
        return tensor.held.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return OnCard(grad)


def _to_cpu(place: Any = None, *_: Any, device: Any = None, **__: Any) -> bool:
    place = device if device is not None else place
    place = place.device if isinstance(place, Tensor) else place
    return isinstance(place, str | torch.device) and torch.device(place).type == "cpu"


class Waits:
    """What was waited for, by place and operation, since it was last taken."""

    def __init__(self) -> None:
        self._noted: Counter[str] = Counter()

    def note(self, what: str) -> None:
        """Note a wait, with the innermost line that is not PyTorch's own."""
        frames = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
        parts = frames[-1].filename.rpartition("site-packages/")[2].split("/")
        start = next((n for n, part in enumerate(parts) if part in OURS), 0)
        self._noted[f"{'/'.join(parts[start:])} {frames[-1].name} {what}"] += 1

    def take(self) -> tuple["Counter[str]", "Counter[str]"]:
        """Those of the project's own lines, and those of libraries'."""
        found, self._noted = self._noted, Counter()
        ours = Counter({place: count for place, count in found.items() if place.startswith(OURS)})
        return ours, found - ours


_waits = Waits()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = tree_flatten((args, kwargs))[0]
    tensors = [t for t in given if isinstance(t, Tensor)]
    place = next((one for one in given if isinstance(one, torch.device)), None)
    here = [t for t in tensors if not isinstance(t, OnCard) and t.dim() > 0]
    there = len(here) < len(tensors) and any(isinstance(t, OnCard) for t in tensors)
    on_card = there or (place is not None and place.type == "cuda")
    if there and here and func not in COPIES | INDEXING:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {[t.shape for t in tensors]}")
    if on_card and _waits_for(func, args, kwargs, here, there):
        _waits.note(str(func))
    if func is aten.copy_.default and not isinstance(args[0], OnCard) and there and len(args) > 2 and args[2]:
        _check_order(func, [args[1]], None)
        _garbage(args[0])
        _current_stream().copy_later(lambda: func(args[0], args[1].held))
        return args[0]
    held, held_kwargs = tree_map(_on_host, (args, kwargs))
    if held_kwargs.get("pin_memory"):
        held_kwargs["pin_memory"] = False
    out = func(*held, **held_kwargs)
    if on_card:
        _check_order(func, [t for t in tensors if isinstance(t, OnCard)], out)
    if func is aten.copy_.default:
        return args[0]
    if not on_card:
        return out
    wrapped = tree_map(lambda t: OnCard(t) if isinstance(t, Tensor) and not isinstance(t, OnCard) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _on_host(one: Any) -> Any:
    if isinstance(one, torch.device) and one.type == "cuda":
        return torch.device("cpu")
    return one.held if isinstance(one, OnCard) else one


def _waits_for(func: Any, args: Any, kwargs: dict[str, Any], here: list[Tensor], there: bool) -> bool:
    """Whether PyTorch waits for the card in this operation."""
    if func is aten.copy_.default:
        between = isinstance(args[0], OnCard) != isinstance(args[1], OnCard)
        return between and args[1].dim() > 0 and not (len(args) > 2 and args[2])
    if func in MOVES:
        return not there and not kwargs.get("non_blocking", False) and True not in args[3:4]
    if func in INDEXING:
        places = [t for t in args[1] if t is not None]
        return bool(here) or any(t.dtype == torch.bool for t in places)
    return func in ASKING


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_submit_plainly = ThreadPoolExecutor.submit


def _submit(self: ThreadPoolExecutor, work: Any, *args: Any) -> "Future[Any]":
    """A mode belongs to its thread; others are to know the card, too."""

    def run() -> Any:
        with _Mode():
            return work(*args)

    return _submit_plainly(self, run)


@contextmanager
def simulated_card() -> Iterator[Waits]:
    """While it lasts, ``cuda:0`` is there; gives the waits for it."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _waits.take()
    _device_constructors()  # PyTorch keeps a list of functions, ``torch.tensor`` among them, once it was asked for it
    cuda = {"_lazy_init": lambda: None, "Stream": _Stream, "stream": _stream, "current_stream": _current_stream}
    cuda["device"] = _device
    transfer._stream_of.cache_clear()
    _written.clear()
    _DEFAULT.seen.clear()
    try:
        with ExitStack() as stack:
            for name, ours in cuda.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, ours))
            stack.enter_context(mock.patch.object(torch, "tensor", _tensor))
            stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", _submit))
            stack.enter_context(_Mode())
            yield _waits
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        transfer._stream_of.cache_clear()
