"""Retrieval causal attention, and its door into transformers.

Legend: B batch rows, H query heads, H_kv key/value heads, T local tokens, M retrieved tokens, D head size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_memlong.kernels import SplitJointAttention, can_split

ATTENTION_NAME = "memlong"


def joint_mask(memory_mask: Tensor, tokens: int, local_mask: Tensor | None = None) -> Tensor:
    """Boolean mask (B, 1, T, M + T): every query sees all real retrieved tokens, then the local tokens causally.

    Args:
        memory_mask: (B, M), true where a retrieved token is real.
        tokens: T.
        local_mask: (B or 1, 1, T, T) boolean or additive mask to use instead of the plain causal one.
    """
    rows = memory_mask.shape[0]
    if local_mask is None:
        local = torch.ones(tokens, tokens, dtype=torch.bool, device=memory_mask.device).tril()[None, None]
    else:
        local = local_mask if local_mask.dtype == torch.bool else local_mask == 0
    seen = memory_mask[:, None, None, :].expand(-1, 1, tokens, -1)
    return torch.cat([seen, local.expand(rows, 1, tokens, tokens)], dim=-1)


def retrieval_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    memory_mask: Tensor | None = None,
    local_mask: Tensor | None = None,
    fusion: str = "joint",
    gate: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend to retrieved tokens and, causally, to local tokens (paper, section 2: retrieval causal attention).

    ``joint`` takes one softmax over [memory | local]. ``gated`` is the paper's
    ``S = [g * softmax(q K_mem^T), softmax(q K_loc^T)]`` with one gate g a head, so g = 0 is the backbone.

    Args:
        query: (B, H, T, D), rotated.
        key: (B, H_kv, T, D), rotated; H_kv divides H (grouped queries).
        value: (B, H_kv, T, D).
        memory_key: (B, H_kv, M, D), rotated to its own positions.
        memory_value: (B, H_kv, M, D).
        memory_mask: (B, M) bool, false for padding; None: all real. A row may have no real token at all.
        local_mask: Mask of the local part if it is not plainly causal, (B or 1, 1, T, T).
        fusion: ``joint`` or ``gated``.
        gate: (H,), for ``gated``.
        scaling: Factor on the scores; None: 1 / sqrt(D).
        dropout: Probability, applied to attention weights.
        mask: What :func:`joint_mask` returned, if the caller has it already.

    Returns:
        (B, H, T, D), in the dtype of ``query``.
    """
    memory_key, memory_value = memory_key.to(query.dtype), memory_value.to(query.dtype)
    if fusion == "joint" and local_mask is None and mask is None and can_split(query, memory_mask, dropout):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return SplitJointAttention.apply(query, key, value, memory_key, memory_value, scale)
    if memory_mask is None:
        memory_mask = memory_key.new_ones(memory_key.shape[0], memory_key.shape[2], dtype=torch.bool)

    def attend(keys: Tensor, values: Tensor, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor:
        if query.is_cuda and attn_mask is not None and query.shape[1] != keys.shape[1]:
            # A mask together with enable_gqa leaves CUDA's fused kernels for the slow one.
            group = query.shape[1] // keys.shape[1]
            keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=query.shape[1] != keys.shape[1],
        )

    if fusion == "joint":
        mask = joint_mask(memory_mask, query.shape[2], local_mask) if mask is None else mask
        return attend(torch.cat([memory_key, key], dim=2), torch.cat([memory_value, value], dim=2), mask)
    if fusion != "gated" or gate is None:
        raise ValueError(f"fusion={fusion!r} with gate={gate!r}: use 'joint', or 'gated' with a gate of shape (H,)")
    local = attend(key, value, local_mask, is_causal=local_mask is None)
    # Kernels differ on a softmax over nothing (zero or NaN), so a row without memory attends to its padding and is
    # multiplied by zero.
    filled = memory_mask.any(dim=-1)
    seen = (memory_mask | ~filled[:, None])[:, None, None, :].expand(-1, 1, query.shape[2], -1)
    remembered = attend(memory_key, memory_value, seen)
    weight = gate.float()[None, :, None, None] * filled[:, None, None, None]
    return (local.float() + weight * remembered.float()).to(query.dtype)


class OnDemand(Mapping[int, tuple[Tensor, Tensor]]):
    """What retrieval layers read, got ready when the first of them asks: until then the layers below are computed.

    Args:
        layers: The layers that will find something.
        prepare: Gives it, for all of them.
    """

    def __init__(self, layers: Sequence[int], prepare: Callable[[], Mapping[int, tuple[Tensor, Tensor]]]) -> None:
        self._layers, self._prepare = layers, prepare

    @cached_property
    def _ready(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        return self._prepare()

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
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
class CarriedMemory:
    """What one forward pass carries, as a keyword argument, down to every attention layer.

    It is an argument and not state on a module, so gradient checkpointing re-runs a layer with the same memory.
    """

    memory: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> keys, already at their positions, and values, (B, H_kv, M, D); only retrieval layers have an entry."""
    mask: Tensor | None = None
    """(B, M) bool; None where every retrieved token is real, which the fast paths need."""
    fusion: str = "joint"
    gates: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """Layer, as a string -> (H,)."""
    capture: frozenset[int] = frozenset()
    """Layers whose local keys and values are wanted."""
    captured: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> rotated keys and values (B, H_kv, T, D), filled during the pass, detached."""
    _joint: Tensor | None = None

    def joint(self, query: Tensor, keys: Tensor, local_mask: Tensor | None, dropout: float) -> Tensor | None:
        """The mask of ``joint`` fusion where one is needed, built once a pass for all layers."""
        if local_mask is not None or can_split(query, self.mask, dropout):
            return None
        if self._joint is None:
            rows, tokens = keys.shape[0], keys.shape[2]
            real = keys.new_ones(rows, tokens, dtype=torch.bool) if self.mask is None else self.mask
            self._joint = joint_mask(real, query.shape[2])
        return self._joint


def memory_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    memory: CarriedMemory | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls in every layer; plain SDPA where there is no memory to read."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if memory is not None and layer in memory.capture:
        memory.captured[layer] = (key.detach(), value.detach())
    if memory is None or layer not in memory.memory:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    memory_keys, memory_values = memory.memory[layer]
    joint = memory.joint(query, memory_keys, attention_mask, dropout) if memory.fusion == "joint" else None
    output = retrieval_causal_attention(
        query,
        key,
        value,
        memory_keys,
        memory_values,
        memory_mask=memory.mask,
        local_mask=attention_mask,
        fusion=memory.fusion,
        gate=memory.gates.get(str(layer)),
        scaling=scaling,
        dropout=dropout,
        mask=joint,
    )
    return output.transpose(1, 2).contiguous(), None


def register_attention() -> str:
    """Register the function with transformers (idempotent) and return its name."""
    AttentionInterface.register(ATTENTION_NAME, memory_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    return ATTENTION_NAME
