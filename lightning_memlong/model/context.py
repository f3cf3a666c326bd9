"""What one forward pass carries down to its layers, and brings back from them.

Legend: B rows, G groups of a row's tokens with a memory of their own, T tokens, M retrieved tokens, H_kv key/value
heads, D head size, E hidden size.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memlong.attention import Choice, Memo, Readers, RetrievedKV
from lightning_memlong.backbone import Rotary
from lightning_memlong.bank import Retrieved
from lightning_memlong.errors import UserError
from lightning_memlong.model.layout import MemoryLayout
from lightning_memlong.model.placing import LayerKV, LayerMemory, Places, place
from lightning_memlong.model.watch import Watch, WatchedSet
from lightning_memlong.text import sent


class StopForward(Exception):
    """Ends a forward pass early: all that was asked for has been captured."""


class LazyKV(Mapping[int, LayerMemory]):
    """What retrieval layers read, got ready when the first of them asks: until then the layers below are computed.

    Args:
        layers: The layers that will find something.
        prepare: Gives it, for all of them.
    """

    def __init__(self, layers: Sequence[int], prepare: Callable[[], Mapping[int, LayerMemory]]) -> None:
        self._layers, self._prepare = layers, prepare

    @cached_property
    def _ready(self) -> Mapping[int, LayerMemory]:
        return self._prepare()

    def __getitem__(self, layer: int) -> LayerMemory:
        """What a layer reads."""
        return self._ready[layer]

    def __contains__(self, layer: object) -> bool:
        """Whether a layer will find something; nothing is got ready for the answer."""
        return layer in self._layers

    def __iter__(self) -> Iterator[int]:
        """The layers."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self._layers)


@dataclass
class ForwardContext:
    """What one forward pass carries, as the keyword argument ``memory``, down to every attention layer.

    It is an argument and not state on a module, so gradient checkpointing re-runs a layer with the same memory.
    The first fields ask, the last ones (``captured``, ``memory_mass``, ``layer_use``, ``hidden``) are filled during the
    pass.
    """

    memory_kv: Mapping[int, LayerMemory] = field(default_factory=dict)
    """Layer -> keys at their positions, and values; retrieval layers have an entry."""
    memory_mask: Tensor | None = None
    """(B * G, M) bool; None where every retrieved token is real."""
    near_mask: Tensor | None = None
    """The same for those near; None where all are real, or there are none."""
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    """Layer, as a string -> (H,), for fusion ``gated``."""
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """Layer, as a string -> (H,), added to its heads' scores in memory, for fusion ``joint``."""
    share: Tensor | None = None
    """(B * G, 1), added to all biases, so that memory weighs as ``memory_reference`` says; None: nothing."""
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    """Layer, as a string -> (H,), logarithms of factors on its heads' scores in memory, for position ``fixed``."""
    turn_query: Callable[[int, Tensor, int], Tensor] | None = None
    """Turns a layer's rotated queries (B, H, T, D), the first of them at a position, to memory's distance; None:
    memory is read with them as they are."""
    begin: int = 0
    """Position of the pass's first token: those before it lie in a cache."""
    choice: Choice | None = None
    """How many of the retrieved chunks each token and head reads; None: all."""
    readers: Readers | None = None
    """Whose attention says how much each chunk is used; None: nobody wants to know."""
    watch: WatchedSet | None = None
    """Is told the attention of each head to each chunk; None: nobody watches."""
    prefix: int = 0
    """Tokens before the window that do not read memory."""
    backend: str = "auto"
    """Which attention kernels, see :func:`lightning_memlong.attention.functional.choose_kernel`."""
    capture_layers: frozenset[int] = frozenset()
    """Layers whose local keys and values are wanted."""
    stop_at_layer: int | None = None
    """Layer after whose keys and values nothing is wanted any more: there the pass ends; None: it runs to the end."""
    captured: dict[int, LayerKV] = field(default_factory=dict)
    """Layer -> rotated keys and values (B, H_kv, T, D), detached."""
    memory_mass: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> share of attention on memory (B, H), mean over tokens, where it is known."""
    layer_use: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> share of attention that each chunk gets (B * G, k), mean over heads and a sample of tokens."""
    hidden: Tensor | None = None
    """(B, T, E), hidden states that leave the memory layer, detached."""
    memo: Memo = field(default_factory=Memo)

    @property
    def chunk_use(self) -> Tensor | None:
        """(B * G, k) float32, the share of attention that each chunk got, mean over layers; None: it was not asked."""
        return torch.stack([*self.layer_use.values()]).mean(0) if self.layer_use else None

    def retrieved(self, layer: int, query: Tensor) -> RetrievedKV:
        """What a retrieval layer reads, given its rotated queries (B, H, T, D)."""
        keys, values, near = self.memory_kv[layer]
        name = str(layer)
        reading = None
        if self.turn_query is not None:
            reading = self.turn_query(layer, query[:, :, self.prefix :], self.begin + self.prefix)
            if (scale := self.scales.get(name)) is not None:
                reading = reading * scale.exp().to(reading.dtype)[:, None, None]
        bias = self.biases.get(name)
        if self.share is not None:
            bias = self.share.expand(-1, query.shape[1]) if bias is None else bias + self.share
        return RetrievedKV(
            keys, values, self.memory_mask, self.prefix, self.gates.get(name), reading, bias,
            self.choice, None if near is None else RetrievedKV(*near, self.near_mask),
        )  # fmt: skip


def keep_hidden(layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
    """A forward hook that leaves a layer's hidden states with what the pass carries."""
    if (context := kwargs.get("memory")) is not None:
        context.hidden = (output[0] if isinstance(output, tuple) else output).detach()


RAISED_UP_TO = 1024
"""Windows up to this long raise a few chunks that nobody asked for as far as those that are asked for [tokens]."""


def _share(places: Places, least: float, most: int, rows: int, device: torch.device) -> Tensor:
    """What lets the far tokens of each row weigh as if they were at least so many, and at most so many (R, 1).

    The attention that n tokens get which all say as much grows with n, and beside a window a few get next to nothing.
    With this their exponentials' mean counts, not their sum.
    """
    if places.mask is None:
        logs = torch.full((rows, 1), math.log(places.far), device=device)
    else:
        logs = places.mask.sum(1, keepdim=True).clamp(min=1).float().log()
    return logs.clamp(min=math.log(least), max=math.log(most)) - logs


def _least(reference: int, asked: bool, window: int) -> float:
    """As how many tokens a few far ones weigh: the reference, or less in a long window that asked for nothing.

    The longer a window, the more it says by itself: beyond ``RAISED_UP_TO`` tokens by the square (docs/results.md).
    """
    return reference if asked else reference * min(1.0, (RAISED_UP_TO / max(1, window)) ** 2)


class ContextFactory:
    """Makes the contexts of a model's passes, and reads from them what a bank stores.

    Args:
        layout: Which layers store and read memory.
        rotary: The backbone's positions.
        gates: Layer, as a string -> gates (H,), for fusion ``gated``.
        biases: Layer, as a string -> numbers (H,), for fusion ``joint``.
        scales: Layer, as a string -> logarithms of factors (H,), for position ``fixed``.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        rotary: Rotary,
        gates: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
    ) -> None:
        self.layout, self.rotary, self.gates, self.biases, self.scales = layout, rotary, gates, biases, scales
        self.watch: Watch | None = None
        """Is told of the attention in all passes while it is here, see :func:`watching`."""

    def new_context(self, retrieved: Retrieved | None, input_ids: Tensor, bos: int | None) -> ForwardContext:
        """The context of a pass over a window (B, T): the memory it reads, and room for what is to be stored.

        Raises:
            UserError: If there are not as many memories as rows, or parts of rows.
        """
        context = ForwardContext(
            capture_layers=frozenset(self.layout.stored_layers), prefix=int(bos is not None),
            backend=self.layout.attention,
        )  # fmt: skip
        rows, tokens = input_ids.shape
        self.attach_memory(context, retrieved, tokens + context.prefix - 1, input_ids.device)
        if retrieved is not None and context.memory_kv:
            groups = len(retrieved.mask) // rows
            if len(retrieved.mask) != rows * groups or tokens % groups:
                raise UserError(
                    f"memory: {len(retrieved.mask)} rows for {rows} rows of {tokens} tokens. Allowed: as many, or a "
                    "whole number of times as many that divides the tokens. Fix: use a bank of as many rows as the "
                    "batch."
                )
        return context

    def attach_memory(
        self, context: ForwardContext, retrieved: Retrieved | None, reach: int, device: torch.device
    ) -> None:
        """Let a pass read what was retrieved; it is rotated when the first layer asks for it, and kept for the others.

        Args:
            context: Of the pass.
            retrieved: None, or without a real token: the plain backbone.
            reach: Last position of the window that will read it.
            device: Where the pass runs.
        """
        if retrieved is None or retrieved.empty:
            return
        layout = self.layout
        places = Places.of(retrieved, layout, device)
        layers = layout.retrieval_layers
        context.memory_kv = LazyKV(layers, lambda: place(retrieved, places, layout, self.rotary, reach, device))
        context.memory_mask, context.near_mask = places.mask, places.near_mask
        context.gates = self.gates
        if places.far or layout.position != "fixed":
            context.biases = self.biases
        if places.far:
            context.turn_query, context.scales = self._turning(), self.scales
        every = places.far == 0 and layout.position == "fixed"  # what is near is read by all
        if retrieved.top_k is not None and retrieved.top_k < retrieved.positions.shape[1] and not every:
            context.choice = Choice(retrieved.chunk_size, retrieved.top_k)
        if places.far and layout.memory_reference is not None and layout.fusion == "joint":
            most = layout.memory_reference
            least = _least(most, retrieved.asked, reach + 1)
            context.share = _share(places, least, most, len(retrieved.mask), device)
        if retrieved.count_attention:
            lengths = None if retrieved.length is None else sent(retrieved.length, device)
            context.readers = Readers(retrieved.chunk_size, retrieved.positions.shape[1], lengths)
        if self.watch is not None:
            context.watch = self.watch.begin(retrieved)

    def _turning(self) -> Callable[[int, Tensor, int], Tensor]:
        """What turns queries to memory's distance in one pass; layers that share a table share its angles."""
        known: dict[str, tuple[tuple[int, int], Any]] = {}

        def turn(layer: int, query: Tensor, begin: int) -> Tensor:
            table, place = self.rotary.table(layer), (begin, begin + query.shape[2])
            if table not in known or known[table][0] != place:
                tokens, reach = torch.arange(*place, device=query.device), place[1] - 1
                known[table] = place, self.rotary.at_distance(layer, self.layout.memory_distance, tokens, reach)
            angles = known[table][1]
            return query if angles is None else self.rotary.turn_query(query, angles)

        return turn

    def captured_kv(self, context: ForwardContext) -> LayerKV:
        """Unrotated keys and values of the window a pass has read, as in :class:`MemLongOutput`."""
        return self.unrotate_kv(context.captured, context.prefix)

    @torch.no_grad()
    def unrotate_kv(self, found: Mapping[int, LayerKV], begin: int, end: int | None = None) -> LayerKV:
        """Keys and values of some positions, as a bank stores them.

        Args:
            found: Of each stored layer, rotated keys and values (B, H_kv, T, D), the first of them at position 0.
            begin: First position.
            end: The one after the last; None: T.
        """
        layers = self.layout.stored_layers
        rotated, values = (torch.stack([found[n][i][:, :, begin:end] for n in layers]) for i in (0, 1))
        positions = torch.arange(rotated.shape[3], device=rotated.device)[None] + begin
        # Under autocast, rotating makes keys float32; attention computes in what the values are in.
        keys = self.rotary.unrotate(rotated, positions, layers).to(values.dtype)
        return (keys[0], values[0]) if self.layout.source == "single" else (keys, values)
