"""Other ways of reading what is stored: where it stands, by which layers and with which biases; and watching it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from lightning_memlong.config import ModelConfig, require
from lightning_memlong.model.layout import MemoryLayout, lay_out
from lightning_memlong.model.memory_weights import LearnedReading, find_memory_weights
from lightning_memlong.model.model import MemLongModel
from lightning_memlong.model.watch import Watch

READING = ("position", "memory_distance", "memory_near", "memory_reference", "memory_weights", "retrieval_layers")
"""Fields of the model group that say nothing of what a bank holds."""


@dataclass(frozen=True)
class Reading:
    """A way of reading memory."""

    layout: MemoryLayout
    biases: Mapping[str, Tensor]
    """Layer, as a string -> (H,); none: nothing is added."""
    scales: Mapping[str, Tensor]
    """Layer, as a string -> (H,), logarithms of factors; none: nothing is multiplied."""


def as_reading(model: MemLongModel, changes: Mapping[str, Any], key: str) -> Reading:
    """The way a model reads memory, with some settings changed.

    Args:
        model: The model; its bank's keys and values are what is read.
        changes: Fields of the model group, those of ``READING``.
        key: The setting they come from, for messages.

    Raises:
        UserError: For another field, a value that cannot be used, or layers that are not stored.
    """
    other = sorted({*changes} - {*READING})
    require(not other, key, other, f"of the model group: {', '.join(READING)}", "set it for all: --model.*")
    own = {f.name: getattr(model.layout, f.name) for f in fields(ModelConfig) if hasattr(model.layout, f.name)}
    chosen = ModelConfig(**{**own, **changes})
    biases, scales = _detached(model.memory_bias), _detached(model.memory_scale)
    mine = LearnedReading("model", biases, scales, {}) if biases else None
    found = find_memory_weights(model.name, model.backbone, chosen) if "memory_weights" in changes else mine
    layout = lay_out(model.config, chosen, found or mine)
    stored = model.layout.stored_layers
    unknown = sorted({*layout.retrieval_layers} - {*stored}) if layout.source == "per_layer" else []
    require(not unknown, key, f"retrieval_layers {unknown}", f"layers that are stored: {stored}", "leave them out")
    if found is not None:
        biases, scales = found.biases, found.scales
    elif "memory_weights" in changes:
        biases = scales = {}
    how = ({layer: number.to(model.device) for layer, number in learned.items()} for learned in (biases, scales))
    return Reading(replace(layout, stored=tuple(stored)), *how)


def _detached(learned: nn.ParameterDict) -> Mapping[str, Tensor]:
    return {layer: number.detach() for layer, number in learned.items()}


@contextmanager
def reading(model: MemLongModel, way: Reading | None) -> Iterator[None]:
    """Let a model read memory another way for a while; None: its own."""
    if way is None:
        yield
        return
    contexts = model.contexts
    own = contexts.layout, contexts.biases, contexts.scales
    contexts.layout, contexts.biases, contexts.scales = way.layout, way.biases, way.scales
    try:
        yield
    finally:
        contexts.layout, contexts.biases, contexts.scales = own


@contextmanager
def watching(model: MemLongModel, last: int = 1) -> Iterator[Watch]:
    """Be told the attention that each head gives each retrieved chunk, in all of a model's passes in this block.

    Args:
        model: The model; what it computes stays the same.
        last: How many tokens of each pass are watched, the last ones [tokens].
    """
    before = model.contexts.watch
    model.contexts.watch = watch = Watch(last)
    try:
        yield watch
    finally:
        model.contexts.watch = before
