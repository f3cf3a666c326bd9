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

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_memlong.attention.choice import Choice

AttentionState = tuple[Tensor, Tensor]
"""Output (B, H, T, D) and log-sum-exp (B, H, T) float32 of attention to some of the keys."""

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


def merge_memory(first: AttentionState, second: AttentionState) -> AttentionState:
    """Two parts of memory as one; where neither has a token, that counts nothing either."""
    lse = torch.logaddexp(first[1], second[1])
    whole = lse.masked_fill(lse == -math.inf, 0.0)  # minus infinity less itself is no number
    first_share, second_share = ((part[1] - whole).exp()[..., None] for part in (first, second))
    output = first[0].float() * first_share + second[0].float() * second_share
    return output.to(first[0].dtype), lse


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], AttentionState]
"""Attention of queries to keys and values under a mask, (B, S) or (B or 1, 1, T, S), true or additive; or causally."""


def seen_and_filled(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What each row attends to, given which retrieved tokens are real (B * G, M), and which rows have any (B * G,).

    Kernels differ on a softmax over nothing, so a row without memory attends to its padding, and that counts nothing.
    """
    filled = mask.any(dim=-1)
    return mask | ~filled[:, None], filled


def attend_to_memory(
    attend: Attend,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: tuple[Tensor, Tensor] | None,
    bias: Tensor | None = None,
) -> AttentionState:
    """The memory part.

    Args:
        attend: How.
        query: (B, H, T, D).
        keys: (B * G, H_kv, M, D).
        values: Shaped as ``keys``.
        mask: What :func:`seen_and_filled` makes of one.
        bias: (H,) or (B * G, H), added to all scores of a head: so, to their log-sum-exp.
    """
    groups = len(keys) // len(query)
    output, lse = attend(fold(query, groups), keys, values, None if mask is None else mask[0], False)
    if mask is not None:
        lse = lse.masked_fill(~mask[1][:, None, None], -math.inf)
    lse = lse if bias is None else lse + bias[..., None]
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
    choice: Choice | None = None,
) -> AttentionState:
    """Attention in plain tensor operations, some queries at a time, softmax in float32; differentiable.

    For what no fused kernel of PyTorch computes: soft-capped scores (Gemma 2), and queries that choose what they read.
    Scores of one block exist at a time, in the backward pass too, where they are computed again. Each query must see a
    key.

    Args:
        query: (B, H, T, D).
        key: (B, H_kv, S, D).
        value: (B, H_kv, S, D).
        mask: (B, S) or (B or 1, 1, T, S), boolean or additive; None: all keys, or those up to the query if ``causal``.
        causal: Query t sees keys 0..t.
        scale: Factor on scores.
        softcap: Cap c: scores become c * tanh(scores / c).
        choice: Each query of each head reads only the chunks that it chooses; None: all keys.
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
        if choice is not None:
            scores = choice.restrict(scores)
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
