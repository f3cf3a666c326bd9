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
    """Which tokens of a record stand far, all at one distance, and which before the window, at places of their own.

    Chunks lie in document order, so the near ones are the last of their rows. Rows may have different numbers of them:
    the far part is then the whole record, under a mask.
    """

    positions: Tensor | None
    """(R, n) of the last n tokens, those that may be near, for the backbone's table; None: none is."""
    far: int
    """The first so many tokens may be far."""
    mask: Tensor | None
    """(R, far) bool, which tokens are far; if none may be, (R, n), which are near. None: all."""
    near_mask: Tensor | None = None
    """(R, n) bool, which are near, where others are far; None: all."""

    @classmethod
    def of(cls, retrieved: Retrieved, layout: MemoryLayout, prefix: int, device: torch.device) -> "Places":
        """Where the tokens of a record stand before a window that begins at position ``prefix``.

        What is near is looked up on the CPU, where records say where their chunks come from: no device is waited for.
        """
        real = retrieved.mask.to(device)
        mask = None if retrieved.full else real
        if layout.position != "fixed":
            return cls(memory_positions(real, layout.position), 0, mask)
        near, size = retrieved.near(layout.memory_near).cpu(), retrieved.chunk_size
        count, tokens = int(near.sum(1).max()), real.shape[1]
        if count == 0:
            return cls(None, tokens, mask)
        last, begins = near[:, -count:], retrieved.positions.cpu()[:, -count:]
        distance = torch.where(last, _starts(retrieved, len(near)) - begins, 0)
        positions = prefix - distance[:, :, None] + torch.arange(size)
        mixed = bool((~last & (begins >= 0)).any())  # a row with fewer has far ones where others have near ones
        is_near = near.repeat_interleave(size, 1).to(device)
        far = tokens if mixed else tokens - count * size
        far_mask = mask if mask is None and not mixed else (real & ~is_near)[:, :far]
        near_mask = None if retrieved.full and bool(last.all()) else (real & is_near)[:, -count * size :]
        moved = positions.flatten(1).to(device)
        return cls(moved, far, far_mask, near_mask) if far else cls(moved, 0, near_mask)


def _starts(retrieved: Retrieved, rows: int) -> Tensor:
    """(R, 1) where the window of each row of a record begins."""
    assert retrieved.window_start is not None, "nothing is near a window that begins nobody knows where"
    return retrieved.window_start.cpu().repeat_interleave(rows // len(retrieved.window_start))[:, None]


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
        for layer, i in _places(layout).items()
    }


def _places(layout: MemoryLayout) -> dict[int, int]:
    """Retrieval layer -> where among the stored ones its keys and values are."""
    stored = layout.stored_layers
    return {layer: 0 if layout.source == "single" else stored.index(layer) for layer in layout.retrieval_layers}


def _rotated(
    keys: Tensor, values: Tensor, positions: Tensor, layout: MemoryLayout, rotary: Rotary, reach: int
) -> dict[int, LayerKV]:
    if layout.source == "per_layer":
        turned = rotary.rotate(keys, positions, layout.stored_layers, reach)
        return {layer: (turned[i], values[i]) for layer, i in _places(layout).items()}
    # One layer's keys read by many, each with its own table; layers that share one share the result.
    done: dict[str, Tensor] = {}
    for layer in layout.retrieval_layers:
        table = rotary.table(layer)
        if table not in done:
            done[table] = rotary.rotate(keys, positions, [layer], reach)[0]
    return {layer: (done[rotary.table(layer)], values[0]) for layer in layout.retrieval_layers}
