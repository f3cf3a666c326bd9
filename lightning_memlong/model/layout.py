"""Which layers store and read memory, and how."""

import logging
from dataclasses import dataclass, fields
from typing import Any

from lightning_memlong.backbone import choose_layers, unlimited_layers
from lightning_memlong.config import ModelConfig
from lightning_memlong.model.memory_weights import LearnedReading

log = logging.getLogger(__name__)

DISTANCE = 2048
"""Of memory, unless said otherwise [tokens]."""


@dataclass(frozen=True)
class MemoryLayout:
    """Which layers store and read memory, and how."""

    memory_layer: int
    retrieval_layers: list[int]
    source: str
    fusion: str
    position: str
    attention: str
    memory_distance: int
    """Of all of memory but what is near, for position ``fixed`` [tokens]."""
    memory_near: int
    """Chunks that begin within so many before the window stand where they lie, for position ``fixed`` [tokens]."""
    memory_reference: int | None
    """Those at the one distance weigh as if they were so many, for ``joint``; None: as many as they are [tokens]."""
    memory_bias: bool
    memory_scale: bool
    stored: tuple[int, ...] | None = None
    """Layers whose K/V a bank holds, if not those that are read."""

    @property
    def learns_bias(self) -> bool:
        """Whether there is a number a head for memory's scores."""
        return self.memory_bias and self.fusion == "joint"

    @property
    def learns_scale(self) -> bool:
        """Whether there is a factor a head on them."""
        return self.memory_scale and self.fusion == "joint" and self.position == "fixed"

    @property
    def stored_layers(self) -> list[int]:
        """Layers whose K/V go into the bank, in the order of the bank's layer axis."""
        if self.stored is not None:
            return list(self.stored)
        return [self.memory_layer] if self.source == "single" else self.retrieval_layers


def lay_out(config: Any, chosen: ModelConfig, learned_before: LearnedReading | None) -> MemoryLayout:
    """Where a decoder's memory is stored and read.

    Args:
        config: The decoder's own.
        chosen: The settings.
        learned_before: Says which layers read most, where only a number of layers is given.

    Raises:
        UserError: If there are no such layers.
    """
    count = config.num_hidden_layers
    whole = unlimited_layers(getattr(config, "layer_types", None), count)
    best = learned_before.best_layers if learned_before else None
    memory_layer, layers = choose_layers(chosen.memory_layer, chosen.retrieval_layers, count, whole, best)
    how = {f.name: getattr(chosen, f.name) for f in fields(MemoryLayout) if hasattr(chosen, f.name)}
    how["memory_distance"] = _distance(config, chosen)
    return MemoryLayout(**(how | {"memory_layer": memory_layer, "retrieval_layers": layers}))


def _distance(config: Any, chosen: ModelConfig) -> int:
    """Of all of memory, for position ``fixed``."""
    trained = getattr(config, "max_position_embeddings", None) or DISTANCE + 1
    if chosen.memory_distance is None:
        return min(DISTANCE, trained - 1)
    if chosen.position == "fixed" and chosen.memory_distance >= trained:
        log.warning(
            "model.memory_distance=%d is beyond the %d positions the backbone was trained for",
            chosen.memory_distance, trained,
        )  # fmt: skip
    return chosen.memory_distance
