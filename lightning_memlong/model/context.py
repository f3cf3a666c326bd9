"""What a forward pass of a :class:`MemLong` carries down to its layers, and brings back from them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_memlong.backbone.rope import memory_positions
from lightning_memlong.bank import Retrieved
from lightning_memlong.errors import UserError
from lightning_memlong.model.attention_interface import CarriedMemory, OnDemand

if TYPE_CHECKING:
    from lightning_memlong.model.model import MemLong


def carry(model: "MemLong", memory: Retrieved | None, input_ids: Tensor, bos: int | None) -> CarriedMemory:
    """What a pass over a window (B, T) carries: the memory it reads, and room for what is to be stored.

    Raises:
        UserError: If there are not as many memories as rows, or parts of rows.
    """
    carried = CarriedMemory(
        capture=frozenset(model.stored_layers), prefix=int(bos is not None), backend=model.attention
    )
    rows, tokens = input_ids.shape
    remind(model, carried, memory, tokens + carried.prefix - 1)
    if memory is not None and carried.memory:
        groups = len(memory.mask) // rows
        if len(memory.mask) != rows * groups or tokens % groups:
            raise UserError(
                f"memory: {len(memory.mask)} rows for {rows} rows of {tokens} tokens. Allowed: as many, or a whole "
                "number of times as many that divides the tokens. Fix: use a bank of as many rows as the batch."
            )
    return carried


def remind(model: "MemLong", carried: CarriedMemory, memory: Retrieved | None, reach: int) -> None:
    """Let a pass carry what was retrieved; it is rotated when the first layer asks for it, and kept for the others.

    Args:
        model: Whose pass.
        carried: Of the pass.
        memory: None, or without a real token: the plain backbone.
        reach: Last position of the window that will read it.
    """
    if memory is None or memory.mask.shape[1] == 0 or not bool(memory.mask.any()):
        return
    mask = memory.mask.to(model.device)
    carried.memory = OnDemand(model.retrieval_layers, lambda: _rotated(model, memory, mask, reach))
    carried.mask = None if bool(mask.all()) else mask
    carried.gates = model.gates  # type: ignore[assignment]


@torch.no_grad()
def _rotated(model: "MemLong", memory: Retrieved, mask: Tensor, reach: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each retrieval layer, the retrieved keys at their positions, and the values."""
    keys, values = (t.to(mask.device) for t in (memory.keys, memory.values))
    if keys.dim() == 4:
        keys, values = keys[None], values[None]
    if len(keys) != len(model.stored_layers):
        raise UserError(
            f"memory: holds K/V of {len(keys)} layers, the model stores {len(model.stored_layers)} "
            f"(model.source={model.source}). Fix: use a bank filled by a model with the same settings."
        )
    positions, rotary = memory_positions(mask, model.position), model.rotary
    if len(keys) == len(model.retrieval_layers):
        rotated = rotary.rotate(keys, positions, model.retrieval_layers, reach)
        return {layer: (rotated[i], values[i]) for i, layer in enumerate(model.retrieval_layers)}
    # One layer's keys read by many, each with its own table; layers that share one share the result.
    done: dict[str, Tensor] = {}
    for layer in model.retrieval_layers:
        table = rotary.table(layer)
        if table not in done:
            done[table] = rotary.rotate(keys, positions, [layer], reach)[0]
    return {layer: (done[rotary.table(layer)], values[0]) for layer in model.retrieval_layers}


@torch.no_grad()
def captured(model: "MemLong", carried: CarriedMemory) -> tuple[Tensor, Tensor]:
    """Unrotated keys and values of the window a pass has read, as in :class:`MemLongOutput`."""
    return unrotated(model, carried.captured, carried.prefix)


@torch.no_grad()
def unrotated(
    model: "MemLong", found: dict[int, tuple[Tensor, Tensor]], begin: int, end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of some positions, as a bank stores them.

    Args:
        model: Whose.
        found: Of each stored layer, rotated keys and values (B, H_kv, T, D), the first of them at position 0.
        begin: First position.
        end: The one after the last; None: T.
    """
    rotated, values = (torch.stack([found[n][i][:, :, begin:end] for n in model.stored_layers]) for i in (0, 1))
    positions = torch.arange(rotated.shape[3], device=rotated.device)[None] + begin
    # Under autocast, rotating makes keys float32; attention computes in what the values are in.
    keys = model.rotary.unrotate(rotated, positions, model.stored_layers).to(values.dtype)
    return (keys[0], values[0]) if model.source == "single" else (keys, values)
