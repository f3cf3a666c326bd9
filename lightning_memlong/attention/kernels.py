"""Attention in two parts, [memory] and [causal local], merged by their log-sum-exp.

The merge is exact (the online-softmax identity of FlashAttention, arXiv 2205.14135): with o and l the output and
log-sum-exp of each part, L = log(exp(l_1) + exp(l_2)) and o = exp(l_1 - L) o_1 + exp(l_2 - L) o_2. Nothing of size
(T, M + T) is ever built, and exp(l_memory - L) is the attention mass on memory, for nothing.

Memory may be one set for a whole row, or one for each of G groups of tokens (granularity ``chunk``): its rows are then
G times the query's, group by group, and queries are folded to match.

Legend: B rows, G groups, H query heads, H_kv key/value heads, T local tokens, M retrieved tokens, D head size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

AttentionState = tuple[Tensor, Tensor]
"""Output (B, H, T, D) and log-sum-exp (B, H, T) float32 of attention to some of the keys."""

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
BLOCK = 256
"""Queries whose scores exist at a time in :func:`blockwise` [tokens]."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What PyTorch would compute a product with ``tensor`` in: autocast's type where it is on, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def fold(tensor: Tensor, groups: int) -> Tensor:
    """(B, H, T, ...) to (B * G, H, T / G, ...): each group of tokens a row of its own."""
    if groups == 1:
        return tensor
    return tensor.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)


def unfold(tensor: Tensor, groups: int) -> Tensor:
    """Undo :func:`fold`."""
    if groups == 1:
        return tensor
    return tensor.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask, true where a key is seen, as what is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def as_4d(mask: Tensor | None) -> Tensor | None:
    """A mask of keys alone (B, S) as (B, 1, 1, S), which all queries share; others as they are."""
    return mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask


def is_causal(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether local attention without a mask is causal: one token after others (a cache) sees all of them."""
    return mask is None and query.shape[2] == key.shape[2]


def merge_attention_states(local: AttentionState, memory: AttentionState) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over both parts.

    Memory may be that of the last queries only: those before them are a prefix that reads none.

    Returns:
        Output (B, H, T, D), mass on memory (B, H, T - prefix) float32, and log-sum-exp (B, H, T) float32.
    """
    prefix = local[1].shape[-1] - memory[1].shape[-1]
    output, own = local[0][:, :, prefix:], local[1][:, :, prefix:]
    lse = torch.logaddexp(own, memory[1])
    mass = (memory[1] - lse).exp()
    joined = output.float() * (own - lse).exp()[..., None] + memory[0].float() * mass[..., None]
    joined = joined.to(output.dtype)
    if prefix:
        joined = torch.cat([local[0][:, :, :prefix], joined], dim=2)
        lse = torch.cat([local[1][:, :, :prefix], lse], dim=2)
    return joined, mass, lse


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], AttentionState]
"""Attention of queries to keys and values under a mask, (B, S) or (B or 1, 1, T, S), true or additive; or causally."""


def seen_and_filled(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What each row attends to, given which retrieved tokens are real (B * G, M), and which rows have any (B * G,).

    Kernels differ on a softmax over nothing, so a row without memory attends to its padding, and that counts nothing.
    """
    filled = mask.any(dim=-1)
    return mask | ~filled[:, None], filled


def attend_to_memory(
    attend: Attend, query: Tensor, keys: Tensor, values: Tensor, mask: tuple[Tensor, Tensor] | None
) -> AttentionState:
    """The memory part: ``keys``, ``values`` (B * G, H_kv, M, D), and what :func:`seen_and_filled` makes of a mask."""
    groups = len(keys) // len(query)
    output, lse = attend(fold(query, groups), keys, values, None if mask is None else mask[0], False)
    if mask is not None:
        lse = lse.masked_fill(~mask[1][:, None, None], -math.inf)
    return unfold(output, groups), unfold(lse, groups)


# ---- any device, any mask, soft-capped scores ---------------------------------------------------------------


def blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> AttentionState:
    """Attention in plain tensor operations, some queries at a time, softmax in float32; differentiable.

    For what no fused kernel of PyTorch computes: soft-capped scores (Gemma 2). Scores of one block exist at a time, in
    the backward pass too, where they are computed again. Each query must see a key.

    Args:
        query: (B, H, T, D).
        key: (B, H_kv, S, D).
        value: (B, H_kv, S, D).
        mask: (B, S) or (B or 1, 1, T, S), boolean or additive; None: all keys, or those up to the query if ``causal``.
        causal: Query t sees keys 0..t.
        scale: Factor on scores.
        softcap: Cap c: scores become c * tanh(scores / c).
    """
    mask = as_4d(mask)

    @torch.autocast(query.device.type, enabled=False)  # or scores would be what they must not be: bfloat16
    def block(start: int) -> AttentionState:
        rows = slice(start, start + BLOCK)
        part = query[:, :, rows]
        group = query.shape[1] // key.shape[1]
        scores = torch.einsum("bhgtd,bhsd->bhgts", part.unflatten(1, (-1, group)).float(), key.float()) * scale
        scores = scores.flatten(1, 2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + additive(mask if mask.shape[2] == 1 else mask[:, :, rows], torch.float32)  # type: ignore
        elif causal:
            after = torch.arange(key.shape[2], device=key.device) > torch.arange(
                start, start + part.shape[2], device=key.device
            ).unsqueeze(1)
            scores = scores.masked_fill(after, -math.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        output = torch.einsum("bhgts,bhsd->bhgtd", weights.unflatten(1, (-1, group)), value.float()).flatten(1, 2)
        return output.to(query.dtype), lse

    starts = range(0, query.shape[2], BLOCK)
    if torch.is_grad_enabled() and query.requires_grad:
        parts = [checkpoint(block, start, use_reentrant=False) for start in starts]
    else:
        parts = [block(start) for start in starts]
    outputs, sums = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


# ---- the CPU's fused kernel ---------------------------------------------------------------------------------


def can_use_cpu_two_part(query: Tensor, dropout: float) -> bool:
    """Whether :class:`CPUTwoPartAttention` applies: on the CPU, in float32 or bfloat16."""
    return (
        _forward is not None
        and _backward is not None
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and dropout == 0.0
    )


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> AttentionState:
    bias = additive(as_4d(mask), query.dtype)
    return _forward(query, key, value, 0.0, causal and bias is None, attn_mask=bias, scale=scale)  # type: ignore[misc]


class CPUTwoPartAttention(torch.autograd.Function):
    """One softmax over [memory | causal local] by PyTorch's fused CPU kernel; differentiable in query, key and value.

    Not in memory, which is never trained: the fused backward pass over [memory | local] would compute gradients of
    retrieved keys and values as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        local_bias: Tensor | None,
        memory_mask: Tensor | None,
        scale: float,
        prefix: int,
    ) -> tuple[Tensor, Tensor]:
        """Arguments as for ``retrieval_causal_attention``, the local mask additive; gives output and mass on memory."""
        attend = partial(_fused, scale=scale)
        local = attend(query, key, value, local_bias, is_causal(query, key, local_bias))
        seen = None if memory_mask is None else seen_and_filled(memory_mask)
        memory = attend_to_memory(attend, query[:, :, prefix:], memory_key, memory_value, seen)
        output, mass, lse = merge_attention_states(local, memory)
        ctx.save_for_backward(query, key, value, memory_key, memory_value, local_bias, memory_mask, output, lse)
        ctx.scale, ctx.prefix = scale, prefix
        ctx.mark_non_differentiable(mass)
        return output, mass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The flash backward pass, given the merged output and log-sum-exp, yields each part's exact share."""
        grad = grad_outputs[0]
        query, key, value, memory_key, memory_value, local_bias, memory_mask, output, lse = ctx.saved_tensors
        grad_query, grad_key, grad_value = _backward(  # type: ignore[misc]
            grad,
            query,
            key,
            value,
            output,
            lse,
            0.0,
            is_causal(query, key, local_bias),
            attn_mask=local_bias,
            scale=ctx.scale,
        )
        groups = len(memory_key) // len(query)
        delta = (grad.float() * output.float()).sum(-1)
        grad, query, delta, lse = (fold(t[:, :, ctx.prefix :], groups) for t in (grad, query, delta, lse))
        extra = memory_gradient(grad, query, delta, lse, memory_key, memory_value, memory_mask, ctx.scale)
        grad_query[:, :, ctx.prefix :] += unfold(extra, groups)
        return grad_query, grad_key, grad_value, *[None] * 6


def memory_gradient(
    grad: Tensor,
    query: Tensor,
    delta: Tensor,
    lse: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The memory part's gradient of the queries, head by head so that scores stay in cache; in float32.

    With P = exp(q K^T - lse), dP = dO V^T and delta = rowsum(dO * O): dQ = (P * (dP - delta)) K.
    """
    result = torch.zeros_like(query)
    group = query.shape[1] // memory_key.shape[1]
    for row in range(query.shape[0]):
        real = slice(None) if memory_mask is None else memory_mask[row].nonzero().flatten()
        for head in range(query.shape[1]):
            keys, values = (t[row, head // group, real].float() for t in (memory_key, memory_value))
            q, g = query[row, head].float(), grad[row, head].float()
            scores = torch.addmm(lse[row, head][:, None], q, keys.T, beta=-1, alpha=scale).exp_()
            scores.mul_(torch.addmm(delta[row, head][:, None], g, values.T, beta=-1))
            result[row, head] = torch.mm(scores, keys).mul_(scale)
    return result
