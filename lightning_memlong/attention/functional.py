"""Retrieval causal attention as a function of tensors.

Legend: B batch rows, G groups of tokens with a memory of their own (1 unless granularity is ``chunk``), H query heads,
H_kv key/value heads, T local tokens, M retrieved tokens, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.attention.kernels import (
    Attend,
    AttentionState,
    CPUTwoPartAttention,
    additive,
    as_4d,
    attend_to_memory,
    blockwise,
    can_use_cpu_two_part,
    is_causal,
    merge_attention_states,
    seen_and_filled,
)
from lightning_memlong.config import require
from lightning_memlong.errors import UserError

BACKENDS = ("auto", "sdpa", "flex")


@dataclass(frozen=True)
class RetrievedKV:
    """What a layer attends to beside its local tokens; shapes as for :func:`retrieval_causal_attention`."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    prefix: int = 0
    """Local tokens at the beginning that do not read memory: the first token of a text, put before each window."""
    gate: Tensor | None = None
    """(H,) for fusion ``gated``; None for ``joint``."""


@dataclass(frozen=True)
class Scores:
    """How attention weights are made of scores."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


class Memo:
    """Forms of masks that all layers of one pass share, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], tuple[Any, Any]] = {}

    def __call__(self, form: str, mask: Tensor | None, make: Callable[[], Any]) -> Any:
        """The form of ``mask`` by that name."""
        kept = self._made.get((form, id(mask)))
        if kept is None or kept[0] is not mask:  # an identity may be given to another mask once its own is gone
            kept = self._made[form, id(mask)] = (mask, make())
        return kept[1]


def joint_mask(
    memory_mask: Tensor, tokens: int, local_mask: Tensor | None = None, prefix: int = 0, keys: int | None = None
) -> Tensor:
    """Boolean mask (B, 1, T, G * M + S): a query sees the real retrieved tokens of its group, then local ones causally.

    Args:
        memory_mask: (B, G, M), true where a retrieved token is real.
        tokens: T.
        local_mask: (B or 1, 1, T, S) boolean or additive mask to use instead of the plain causal one.
        prefix: Local tokens at the beginning that see no memory.
        keys: S, local keys, of which the queries are the last; None: T.
    """
    rows, groups, remembered = memory_mask.shape
    if local_mask is None:
        keys = tokens if keys is None else keys
        local = torch.ones(tokens, keys, dtype=torch.bool, device=memory_mask.device).tril(keys - tokens)[None, None]
    else:
        local = local_mask if local_mask.dtype == torch.bool else local_mask == 0
    own = torch.eye(groups, dtype=torch.bool, device=memory_mask.device)
    seen = (own[None, :, :, None] & memory_mask[:, None]).flatten(2)  # (B, G, G * M)
    seen = F.pad(seen.repeat_interleave((tokens - prefix) // groups, dim=1)[:, None], (0, 0, prefix, 0))
    return torch.cat([seen, local.expand(rows, 1, tokens, local.shape[-1])], dim=-1)


def choose_kernel(backend: str, query: Tensor, groups: int, scores: Scores) -> str:
    """Which kernel computes joint attention.

    ``cpu_two_part`` (two parts by the fused CPU kernel), ``flex`` (two parts by FlexAttention), ``eager_blockwise``
    (two parts in plain operations) or ``sdpa_masked`` (one call of PyTorch's attention under a mask).
    """
    if scores.dropout > 0 and (backend == "flex" or scores.softcap is not None):
        raise UserError(
            f"model.backbone: attention dropout of {scores.dropout} cannot be applied with model.attention={backend!r} "
            f"and scores capped at {scores.softcap}. Allowed: 0 there. Fix: set attention_dropout to 0 in the "
            "backbone's config.json, or choose --model.attention sdpa where scores are not capped."
        )
    if backend == "flex":
        if torch.is_grad_enabled() and query.requires_grad:
            require_gradients(backend, query.device)
        return "flex"
    if query.is_cuda and backend == "auto" and scores.dropout == 0.0 and (scores.softcap is not None or groups > 1):
        return "flex"
    if scores.softcap is not None:
        return "eager_blockwise"
    return "cpu_two_part" if backend == "auto" and can_use_cpu_two_part(query, scores.dropout) else "sdpa_masked"


def require_gradients(backend: str, device: torch.device) -> None:
    """Raise a :class:`UserError` unless the backend can be trained with on a device."""
    ok, allowed = backend != "flex" or device.type == "cuda", "auto or sdpa: FlexAttention has gradients on CUDA only"
    require(ok, "model.attention", backend, allowed, "choose one of them, or train on a GPU")


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
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to retrieved tokens and, causally, to local tokens (paper, section 2: retrieval causal attention).

    ``joint`` takes one softmax over [memory | local]. ``gated`` is the paper's
    ``S = [g * softmax(q K_mem^T), softmax(q K_loc^T)]`` with one gate g a head, so g = 0 is the backbone.

    Args:
        query: (B, H, T, D), rotated.
        key: (B, H_kv, T, D), rotated; H_kv divides H (grouped queries).
        value: (B, H_kv, T, D).
        memory_key: (B * G, H_kv, M, D), rotated to its own positions; row b * G + g is seen by the g-th of G equal
            parts of row b's tokens. G = 1: all tokens of a row share one memory.
        memory_value: (B * G, H_kv, M, D).
        memory_mask: (B * G, M) bool, false for padding; None: all real. A row may have no real token at all.
        local_mask: Mask of the local part if it is not plainly causal, (B or 1, 1, T, T), boolean or additive.
        fusion: ``joint`` or ``gated``.
        gate: (H,), for ``gated``.
        scaling: Factor on the scores; None: 1 / sqrt(D).
        dropout: Probability, applied to attention weights.
        softcap: Cap c on scores, c * tanh(score / c) (Gemma 2).
        backend: ``auto``; ``sdpa`` for one masked call of PyTorch's attention; ``flex`` for FlexAttention.

    Returns:
        (B, H, T, D), in the dtype of ``query``.
    """
    if fusion not in ("joint", "gated") or (fusion == "gated" and gate is None):
        raise ValueError(f"fusion={fusion!r} with gate={gate!r}: use 'joint', or 'gated' with a gate of shape (H,)")
    memory = RetrievedKV(memory_key, memory_value, memory_mask, gate=gate if fusion == "gated" else None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_with_memory(query, key, value, memory, local_mask, Scores(scale, softcap, dropout), backend)[0]


def attend_with_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: RetrievedKV,
    local_mask: Tensor | None,
    scores: Scores,
    backend: str = "auto",
    memo: Memo | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`retrieval_causal_attention`, and the share of attention on memory (B, H, T) float32.

    The share is told by all kernels of ``joint`` fusion but the masked one, which gives None; for nothing.
    """
    memo = memo or Memo()
    memory = replace(memory, keys=memory.keys.to(query.dtype), values=memory.values.to(query.dtype))
    kernel = choose_kernel(backend, query, len(memory.keys) // len(query), scores)
    mask = memory.mask
    if memory.gate is None and kernel == "sdpa_masked":
        return _masked(query, key, value, memory, local_mask, scores, memo), None
    if memory.gate is None and kernel == "cpu_two_part":
        bias = memo("bias", local_mask, lambda: additive(local_mask, query.dtype))
        return CPUTwoPartAttention.apply(
            query, key, value, memory.keys, memory.values, bias, mask, scores.scale, memory.prefix
        )
    seen = None if mask is None else memo("seen", mask, lambda: seen_and_filled(mask))
    if memory.gate is not None:
        fused = backend != "flex" and scores.softcap is None
        attend = _plain(scores) if fused else _attend(kernel, scores, memo)
        return _gated(attend, query, key, value, memory, local_mask, seen), None
    attend = _attend(kernel, scores, memo)
    local = attend(query, key, value, local_mask, is_causal(query, key, local_mask))
    reading = query[:, :, memory.prefix :]
    output, mass, _ = merge_attention_states(local, attend_to_memory(attend, reading, memory.keys, memory.values, seen))
    return output, mass.detach()


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores, backend: str, memo: Memo
) -> Tensor:
    """Plain causal attention with soft-capped scores, which PyTorch's own function cannot compute."""
    attend = _attend(choose_kernel(backend, query, 1, scores), scores, memo)
    return attend(query, key, value, mask, is_causal(query, key, mask))[0]


def _attend(kernel: str, scores: Scores, memo: Memo) -> Attend:
    if kernel == "flex":
        from lightning_memlong.attention.flex import (  # its import compiles helpers: only for those who use it
            as_block_mask,
            flex,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> AttentionState:
            blocks = memo("causal" if causal else "blocks", mask, lambda: as_block_mask(mask, causal, q, k))
            return flex(q, k, v, blocks, scores.scale, scores.softcap)

        return attend
    return lambda q, k, v, mask, causal: blockwise(q, k, v, mask, causal, scores.scale, scores.softcap)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scores: Scores) -> Tensor:
    if query.is_cuda and mask is not None and query.shape[1] != keys.shape[1]:
        # A mask together with enable_gqa leaves CUDA's fused kernels for the slow one.
        group = query.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal,
        scale=scores.scale,
        dropout_p=scores.dropout,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _plain(scores: Scores) -> Attend:
    """PyTorch's attention in the shape of a part; it does not tell its log-sum-exp, so what stands there is no use."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> AttentionState:
        output = _sdpa(q, k, v, as_4d(mask), causal, scores)
        return output, output[..., 0]

    return attend


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: RetrievedKV,
    local_mask: Tensor | None,
    scores: Scores,
    memo: Memo,
) -> Tensor:
    rows, tokens = len(query), query.shape[2]

    def mask() -> Tensor:
        real = memory.mask
        if real is None:
            real = memory.keys.new_ones(len(memory.keys), memory.keys.shape[2], dtype=torch.bool)
        return joint_mask(real.unflatten(0, (rows, -1)), tokens, local_mask, memory.prefix, key.shape[2])

    keys, values = (
        torch.cat([t.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3), own], dim=2)
        for t, own in ((memory.keys, key), (memory.values, value))
    )
    return _sdpa(query, keys, values, memo("joint", local_mask, mask), False, scores)


def _gated(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: RetrievedKV,
    local_mask: Tensor | None,
    seen: tuple[Tensor, Tensor] | None,
) -> Tensor:
    assert memory.gate is not None
    local = attend(query, key, value, local_mask, is_causal(query, key, local_mask))[0]
    weight = memory.gate.float()[None, :, None, None]
    reading = query[:, :, memory.prefix :]
    if seen is not None:
        groups = len(memory.keys) // len(query)
        filled = seen[1].view(-1, groups).repeat_interleave(reading.shape[2] // groups, 1)
        weight = weight * filled[:, None, :, None]
    remembered = weight * attend_to_memory(attend, reading, memory.keys, memory.values, seen)[0].float()
    return (local.float() + F.pad(remembered, (0, 0, memory.prefix, 0))).to(query.dtype)
