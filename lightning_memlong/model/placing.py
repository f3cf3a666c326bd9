"""Where retrieved tokens stand, as the layers that read them see it.

Legend: R rows of a record (the batch's, times the groups of tokens with a memory of their own), k chunks, M retrieved
tokens, L layers, H_kv key/value heads, D head size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_memlong.backbone import Rotary, memory_positions
from lightning_memlong.bank import Retrieved
from lightning_memlong.errors import UserError
from lightning_memlong.model.layout import MemoryLayout
from lightning_memlong.text import sent

LayerKV = tuple[Tensor, Tensor]
"""Keys and values (B, H_kv, T, D) of a layer."""


class LayerMemory(NamedTuple):
    """Keys and values (R, H_kv, M, D) that a retrieval layer reads."""

    keys: Tensor
    values: Tensor
    near: LayerKV | None = None
    """Those that stand right before the window, where others stand far; None: there are none."""


@dataclass(frozen=True)
class Places:
    """Which tokens of a record stand far, all at one distance, and which near, where they are before the window.

    Chunks lie in document order, missing ones first, so the near ones are the last of their rows.
    """

    positions: Tensor | None
    """(R, n) of the last n tokens, which are near; None: none is."""
    far: int
    """The first so many tokens are far."""
    mask: Tensor | None
    """(R, far) bool, which of those far are real; if none is far, (R, n), which of those near. None: all."""
    near_mask: Tensor | None = None
    """(R, n) bool, which of those near are real, where others are far; None: all."""

    @classmethod
    def of(cls, retrieved: Retrieved, layout: MemoryLayout, device: torch.device) -> "Places":
        """Where the tokens of a record stand."""
        real = retrieved.mask.to(device)
        mask, tokens = None if retrieved.full else real, real.shape[1]
        if layout.position != "fixed":
            return cls(memory_positions(real, layout.position), 0, mask)
        most, least, positions, is_near = _near(retrieved, layout.memory_near, real)
        if most == 0:
            return cls(None, tokens, mask)
        if least == tokens:
            return cls(positions, 0, mask)
        far = tokens - least
        if is_near is not None:  # rows differ: some tokens are far in one of them and near in another
            return cls(positions, far, (real & ~is_near)[:, :far], (real & is_near)[:, tokens - most :])
        return cls(positions, far, None if mask is None else mask[:, :far], None if mask is None else mask[:, far:])


def _near(retrieved: Retrieved, reach: int, real: Tensor) -> tuple[int, int, Tensor, Tensor | None]:
    """Which tokens stand near: those that lie so close before the window in their document, where they lie.

    Args:
        retrieved: A record; where nobody knows the window's place, its chunks are taken for the text before it.
        reach: How close [tokens].
        real: (R, M) bool, where the window is.

    Returns:
        How many tokens are near in the row that has most, and in that which has least; positions (R, most) of the last
        ones; and, where rows differ, which are near (R, M) bool.
    """
    size = retrieved.chunk_size
    if retrieved.begin is None:
        most = min(real.shape[1], reach // size * size)
        return most, most, memory_positions(real[:, real.shape[1] - most :], "sequential"), None
    distance = retrieved.begin[:, None] - retrieved.positions  # known on the host
    near = (retrieved.positions >= 0) & (distance <= reach)
    counts = near.sum(1)
    most, least = int(counts.max()), int(counts.min())
    places = torch.arange(size) - distance[:, near.shape[1] - most :, None].clamp(max=reach)
    differ = None if most == least else sent(near.repeat_interleave(size, dim=1), real.device)
    return most * size, least * size, sent(places.flatten(1), real.device), differ


@torch.no_grad()
def place(
    retrieved: Retrieved, places: Places, layout: MemoryLayout, rotary: Rotary, reach: int, device: torch.device
) -> dict[int, LayerMemory]:
    """Of each retrieval layer, what it reads: far keys as they are stored, others rotated to their positions.

    Args:
        retrieved: What a bank gave.
        places: Where it stands.
        layout: Which layers store and read.
        rotary: The backbone's positions.
        reach: Last position of the window that will read it.
        device: Where the window is.

    Raises:
        UserError: If the bank was filled from other layers.
    """
    keys, values = (t.to(device) for t in (retrieved.keys, retrieved.values))
    if keys.dim() == 4:
        keys, values = keys[None], values[None]
    if len(keys) != len(layout.stored_layers):
        raise UserError(
            f"memory: holds K/V of {len(keys)} layers, the model stores {len(layout.stored_layers)} "
            f"(model.source={layout.source}). Fix: use a bank filled by a model with the same settings."
        )
    rotated: dict[int, LayerKV] = {}
    if places.positions is not None:
        some = slice(-places.positions.shape[1], None)
        rotated = _rotated(keys[..., some, :], values[..., some, :], places.positions, layout, rotary, reach)
    if not places.far:
        return {layer: LayerMemory(*kv) for layer, kv in rotated.items()}
    far = slice(0, places.far)
    return {
        layer: LayerMemory(keys[i][..., far, :], values[i][..., far, :], rotated.get(layer))
        for layer, i in _stored_at(layout).items()
    }


def _stored_at(layout: MemoryLayout) -> dict[int, int]:
    """Retrieval layer -> where among the stored ones its keys and values are."""
    stored = layout.stored_layers
    return {layer: 0 if layout.source == "single" else stored.index(layer) for layer in layout.retrieval_layers}


def _rotated(
    keys: Tensor, values: Tensor, positions: Tensor, layout: MemoryLayout, rotary: Rotary, reach: int
) -> dict[int, LayerKV]:
    if layout.source == "per_layer":
        turned = rotary.rotate(keys, positions, layout.stored_layers, reach)
        return {layer: (turned[i], values[i]) for layer, i in _stored_at(layout).items()}
    # One layer's keys read by many, each with its own table; layers that share one share the result.
    done: dict[str, Tensor] = {}
    for layer in layout.retrieval_layers:
        table = rotary.table(layer)
        if table not in done:
            done[table] = rotary.rotate(keys, positions, [layer], reach)[0]
    return {layer: (done[rotary.table(layer)], values[0]) for layer in layout.retrieval_layers}
