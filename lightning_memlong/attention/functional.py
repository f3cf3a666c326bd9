"""Retrieval causal attention as a function of tensors.

Legend: B batch rows, G groups of tokens with a memory of their own (1 unless granularity is ``chunk``), H query heads,
H_kv key/value heads, T local tokens, M retrieved tokens, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.attention.choice import Choice
from lightning_memlong.attention.cpu_kernel import CPU_KERNEL, can_use_cpu_kernel
from lightning_memlong.attention.cuda_check import two_parts_are_right
from lightning_memlong.attention.cuda_kernel import CUDA_KERNEL, can_use_cuda_kernel
from lightning_memlong.attention.inputs import Memo, RetrievedKV, Scores
from lightning_memlong.attention.kernels import (
    Attend,
    AttentionState,
    additive,
    as_4d,
    attend_to_memory,
    blockwise,
    is_causal,
    merge_attention_states,
    merge_memory,
    seen_and_filled,
)
from lightning_memlong.attention.masked import attend_masked, sdpa, side_by_side
from lightning_memlong.attention.two_part import FusedKernel, TwoPartAttention
from lightning_memlong.config import require
from lightning_memlong.errors import UserError

BACKENDS = ("auto", "sdpa", "flex", "two_part")
FUSED: dict[str, FusedKernel] = {"cpu_two_part": CPU_KERNEL, "cuda_two_part": CUDA_KERNEL}
"""Kernels that joint attention calls for each part."""


def choose_kernel(backend: str, query: Tensor, groups: int, scores: Scores, chosen: bool = False) -> str:
    """Which kernel computes joint attention; ``chosen``: each token and head chooses what it reads.

    ``cpu_two_part``, ``cuda_two_part`` (two parts by the device's fused kernels), ``flex`` (two parts by
    FlexAttention), ``eager_blockwise`` (two parts in plain operations) or ``sdpa_masked`` (one call of PyTorch's
    attention under a mask).
    """
    if scores.dropout > 0 and (backend == "flex" or scores.softcap is not None):
        raise UserError(
            f"model.backbone: attention dropout of {scores.dropout} cannot be applied with model.attention={backend!r} "
            f"and scores capped at {scores.softcap}. Allowed: 0 there. Fix: set attention_dropout to 0 in the "
            "backbone's config.json, or choose --model.attention sdpa where scores are not capped."
        )
    if backend == "two_part":
        return _two_part(query, scores, chosen)
    if chosen and (backend != "auto" or scores.dropout > 0):
        raise UserError(
            f"memory.candidates: with model.attention={backend!r} and attention dropout of {scores.dropout}, tokens "
            "cannot choose what they read. Allowed: model.attention auto, without dropout. Fix: set these, or leave "
            "memory.candidates out."
        )
    if backend == "flex":
        if torch.is_grad_enabled() and query.requires_grad:
            require_gradients(backend, query.device)
        return "flex"
    if chosen and not can_use_cpu_kernel(query, 0.0):
        return "eager_blockwise"
    if query.is_cuda and backend == "auto" and scores.dropout == 0.0 and (scores.softcap is not None or groups > 1):
        return "flex"
    if scores.softcap is not None:
        return "eager_blockwise"
    if backend == "auto" and can_use_cpu_kernel(query, scores.dropout):
        return "cpu_two_part"
    if backend == "auto" and can_use_cuda_kernel(query, scores.dropout) and two_parts_are_right(query):
        return "cuda_two_part"
    return "sdpa_masked"


def _two_part(query: Tensor, scores: Scores, chosen: bool) -> str:
    """The device's fused kernels, asked for by name."""
    plain = scores.softcap is None
    if plain and can_use_cpu_kernel(query, scores.dropout):
        return "cpu_two_part"
    ok = plain and not chosen and can_use_cuda_kernel(query, scores.dropout)
    found = f"'two_part' for {query.dtype} on {query.device.type}, dropout {scores.dropout}, cap {scores.softcap}"
    found += ", with memory.candidates" if chosen else ""
    allowed = (
        "it, where scores are not capped and nothing is dropped: on CUDA without memory.candidates, on the CPU in "
    )
    require(ok, "model.attention", found, f"{allowed}float32 or bfloat16", "choose auto")
    return "cuda_two_part"


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
    memory_query: Tensor | None = None,
    memory_bias: Tensor | None = None,
    choice: Choice | None = None,
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
        memory_query: (B, H, T, D), what memory is read with; None: ``query``.
        memory_bias: (H,) or (B * G, H), added to a head's scores in memory, for ``joint``: 0 changes nothing, and with
            minus infinity the head reads no memory.
        choice: How many chunks of memory each token and head reads; None: all.
        backend: ``auto``; ``sdpa`` for one masked call of PyTorch's attention; ``flex`` for FlexAttention; ``two_part``
            for the device's fused kernels, called for each part.

    Returns:
        (B, H, T, D), in the dtype of ``query``.
    """
    if fusion not in ("joint", "gated") or (fusion == "gated" and gate is None):
        raise ValueError(f"fusion={fusion!r} with gate={gate!r}: use 'joint', or 'gated' with a gate of shape (H,)")
    gate, bias = (gate, None) if fusion == "gated" else (None, memory_bias)
    memory = RetrievedKV(memory_key, memory_value, memory_mask, gate=gate, query=memory_query, bias=bias, choice=choice)
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
    memory = memory.to(query.dtype)
    if memory.gate is not None and memory.near is not None:  # their softmax is one, whose parts nobody needs
        memory = side_by_side(memory, query)
    kernel = choose_kernel(backend, query, len(memory.keys) // len(query), scores, memory.choice is not None)
    mask, reading = memory.mask, memory.reading(query)
    if memory.gate is None and kernel == "sdpa_masked":
        return attend_masked(query, key, value, memory, local_mask, scores, memo), None
    if memory.gate is None and kernel in FUSED:
        bias = memo("bias", local_mask, lambda: additive(local_mask, query.dtype))
        part = memory.near
        beside = (None, None, None) if part is None else (part.keys, part.values, part.mask)
        return TwoPartAttention.apply(
            query, key, value, reading, memory.keys, memory.values, memory.bias, bias, mask, *beside, scores.scale,
            memory.choice, FUSED[kernel],
        )  # fmt: skip
    seen = None if mask is None else memo("seen", mask, lambda: seen_and_filled(mask))
    fused = memory.gate is not None and backend != "flex" and scores.softcap is None
    to_local = _plain(scores) if fused else _attend(kernel, scores, memo)
    to_memory = to_local if memory.choice is None else _attend(kernel, scores, memo, memory.choice)
    if memory.gate is not None:
        return _gated(to_local, to_memory, query, key, value, memory, local_mask, seen), None
    local = to_local(query, key, value, local_mask, is_causal(query, key, local_mask))
    remembered = attend_to_memory(to_memory, reading, memory.keys, memory.values, seen, memory.bias)
    if (near := memory.near) is not None:
        seen = None if near.mask is None else memo("near", near.mask, lambda: seen_and_filled(near.real()))
        own = attend_to_memory(to_local, query[:, :, memory.prefix :], near.keys, near.values, seen)
        remembered = merge_memory(remembered, own)
    output, mass, _ = merge_attention_states(local, remembered)
    return output, mass.detach()


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores, backend: str, memo: Memo
) -> Tensor:
    """Plain causal attention with soft-capped scores, which PyTorch's own function cannot compute."""
    attend = _attend(choose_kernel(backend, query, 1, scores), scores, memo)
    return attend(query, key, value, mask, is_causal(query, key, mask))[0]


def _attend(kernel: str, scores: Scores, memo: Memo, choice: Choice | None = None) -> Attend:
    if kernel == "flex":
        from lightning_memlong.attention.flex import (  # its import compiles helpers: only for those who use it
            as_block_mask,
            flex,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> AttentionState:
            blocks = memo("causal" if causal else "blocks", mask, lambda: as_block_mask(mask, causal, q, k))
            return flex(q, k, v, blocks, scores.scale, scores.softcap)

        return attend
    return lambda q, k, v, mask, causal: blockwise(q, k, v, mask, causal, scores.scale, scores.softcap, choice)


def _plain(scores: Scores) -> Attend:
    """PyTorch's attention in the shape of a part; it does not tell its log-sum-exp, so what stands there is no use."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> AttentionState:
        output = sdpa(q, k, v, as_4d(mask), causal, scores)
        return output, output[..., 0]

    return attend


def _gated(
    to_local: Attend,
    to_memory: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: RetrievedKV,
    local_mask: Tensor | None,
    seen: tuple[Tensor, Tensor] | None,
) -> Tensor:
    assert memory.gate is not None
    local = to_local(query, key, value, local_mask, is_causal(query, key, local_mask))[0]
    weight = memory.gate.float()[None, :, None, None]
    reading = memory.reading(query)
    if seen is not None:
        groups = len(memory.keys) // len(query)
        filled = seen[1].view(-1, groups).repeat_interleave(reading.shape[2] // groups, 1)
        weight = weight * filled[:, None, :, None]
    remembered = weight * attend_to_memory(to_memory, reading, memory.keys, memory.values, seen)[0].float()
    return (local.float() + F.pad(remembered, (0, 0, memory.prefix, 0))).to(query.dtype)
