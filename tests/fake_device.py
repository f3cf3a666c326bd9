"""A device that is none: tensors of this machine which behave as if they lay on a card, so that waits are counted.

A card works on by itself; what makes the host wait for it is a number, or a tensor whose size depends on numbers,
brought over. Inside :class:`FakeDevice`, tensors made from ``on_device`` ones are on the device too, what is moved
there (``.to(device)``) is as well, and every such wait is noted with the place that asked.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cpu", 0)
"""What ``.device`` of such a tensor is: told from the host, which has no number."""
BRINGS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
SIZED = {"nonzero", "unique", "masked_select", "bincount", "argwhere", "unique_consecutive"}


class OnDevice(torch.Tensor):
    """A tensor that is on the device."""


def on_device(tensor: Tensor) -> Tensor:
    """The same numbers, on the device."""
    return tensor if isinstance(tensor, OnDevice) else tensor.as_subclass(OnDevice)


OURS = ("lightning_memlong", "callbacks", "datamodules")


def _place() -> str:
    """Who asked: the innermost line, by file and function; whether it is ours is told by its beginning."""
    frames = [f for f in traceback.extract_stack()[:-3] if f.filename != __file__]
    # What PyTorch's own functions are made of is their business.
    outside = [f for f in frames if "/torch/" not in f.filename] or frames
    parts = outside[-1].filename.rpartition("site-packages/")[2].split("/")
    start = next((n for n, part in enumerate(parts) if part in OURS), 0)
    return f"{'/'.join(parts[start:])} {outside[-1].name}"


class FakeDevice(TorchFunctionMode):
    """While it lasts, waits are counted: :attr:`waits`, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """Place and what was asked -> how often, since :meth:`take`."""

    def take(self) -> tuple[Counter[str], Counter[str]]:
        """What was noted since the last time: of the project's own lines, and of libraries'."""
        found, self.waits = self.waits, Counter()
        ours = Counter({place: count for place, count in found.items() if place.startswith(OURS)})
        return ours, found - ours

    def _wait(self, what: str) -> None:
        self.waits[f"{_place()} {what}"] += 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, and run on the host."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        first = args[0] if args else None
        there = isinstance(first, OnDevice)
        if there and name == "__get__" and func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE
        if there and (name in BRINGS or name in SIZED):
            self._wait(name)
        if there and name == "__getitem__" and _by_mask(args[1]):
            self._wait("a mask as an index")
        given = [*args[1:], *kwargs.values()]
        to_host = name in ("cpu", "numpy", "tolist") or (name == "to" and any(_is_host(one) for one in given))
        if there and name == "to" and to_host:
            self._wait("to the host")
        to_device = any(isinstance(one, torch.device) and one == DEVICE for one in given)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if to_host:
            return _mapped(found, _on_host)
        inside = any(isinstance(one, OnDevice) for one in _tensors(args) + _tensors(kwargs))
        return _mapped(found, on_device) if inside or to_device else found


def put_on_device(module: torch.nn.Module) -> None:
    """Let a module's parameters and buffers be on the device."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(on_device(weight.data), weight.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else on_device(buffer)


def _by_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _is_host(one: Any) -> bool:
    return one == "cpu" or (isinstance(one, torch.device) and one == torch.device("cpu") and one.index is None)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(torch.Tensor)


def _mapped(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(torch.Tensor, change, found)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        return [t for one in found.values() for t in _tensors(one)]
    return [t for one in found for t in _tensors(one)] if isinstance(found, list | tuple) else []
