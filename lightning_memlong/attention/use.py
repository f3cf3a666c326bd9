"""How much of their attention a window's tokens give to each chunk that was retrieved, from a sample of the tokens.

No kernel tells the weights it computes, so those of a few tokens are computed again, against memory alone: how a token
divides its attention in memory. What of it goes to memory at all is what the kernel told for nothing; where it did not,
the sample's scores against the local tokens say it.

Legend: B rows, G groups, R = B * G, H query heads, H_kv key/value heads, T tokens that read memory, N sampled tokens of
a row and n = N / G of a group, S local keys, M retrieved tokens, k chunks of C tokens, D head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memlong.attention.inputs import RetrievedKV, Scores
from lightning_memlong.attention.kernels import additive, fold

EVERY = 32
"""One token in so many is sampled [tokens]."""
MOST = 64
"""Tokens of a row that are sampled at most, but one of each group [tokens]."""


@dataclass(frozen=True)
class Readers:
    """Whose attention says how much the chunks of a record are used."""

    chunk_size: int
    """C."""
    chunks: int
    """k, of the whole record, those that stand near included."""
    lengths: Tensor | None = None
    """(B,) tokens of a row that are no padding; None: all."""
    last: int | None = None
    """How many tokens, the last ones of each group and every one of them; None: a sample."""

    def sample(self, rows: int, tokens: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens (B, N), evenly spread over what is no padding, group by group; and which groups (R,) have any."""
        part = tokens // groups
        count = max(1, min(part // EVERY, MOST // groups)) if self.last is None else min(self.last, part)
        begins = part * torch.arange(groups, device=device)
        lengths = torch.full((rows,), tokens, device=device) if self.lengths is None else self.lengths
        there = (lengths[:, None] - begins).clamp(0, part)
        steps = torch.arange(count, device=device)
        if self.last is None:
            places = (2 * steps + 1) * there[..., None] // (2 * count)
        else:
            places = (there[..., None] - count + steps).clamp(min=0)
        return (begins[:, None] + places).flatten(1), (there > 0).flatten()


@torch.no_grad()
def chunk_shares(
    query: Tensor,
    key: Tensor,
    memory: RetrievedKV,
    mass: Tensor | None,
    local_mask: Tensor | None,
    scores: Scores,
    readers: Readers,
) -> Tensor:
    """Share of its attention that each head of each sampled token gives each chunk (R, H, n, k) float32; no dropout.

    Over chunks it sums to the share that goes to memory; 0 where nothing was retrieved, or a group has nothing but
    padding. For fusion ``gated``, what goes to memory is the magnitude of the gate.

    Args:
        query: (B, H, prefix + T, D), rotated.
        key: (B, H_kv, S, D), rotated.
        memory: What is read beside the local tokens.
        mass: (B, H, T), share that goes to memory, as :func:`attend_with_memory` tells it; None: it did not.
        local_mask: Mask of the local part, as there.
        scores: How weights are made of scores.
        readers: Whose attention counts.
    """
    groups, prefix = len(memory.keys) // len(query), memory.prefix
    places, there = readers.sample(len(query), query.shape[2] - prefix, groups, query.device)
    with torch.autocast(query.device.type, enabled=False):  # or scores would be what they must not be: bfloat16
        own = _at(query[:, :, prefix:], places)
        reading = own if memory.query is None else _at(memory.query, places)
        parts = _memory_scores(fold(reading, groups), fold(own, groups), memory, scores)
        lse = torch.stack([part.logsumexp(-1) for part in parts]).logsumexp(0)  # (R, H, n)
        if memory.gate is not None:
            share = memory.gate.detach().float().abs()[:, None].expand_as(lse)
        elif mass is not None:
            share = fold(_at(mass[..., None].float(), places)[..., 0], groups)
        else:
            local = _local_lse(own, key, places + prefix, query.shape[2], local_mask, scores)
            share = (lse - torch.logaddexp(lse, fold(local, groups))).exp()
        whole = lse.masked_fill(lse == -math.inf, 0.0)[..., None]  # minus infinity less itself is no number
        shares = query.new_zeros(*lse.shape, readers.chunks, dtype=torch.float32)
        # Far chunks are the first of the record, or all of it under a mask; near ones are its last.
        for number, part in enumerate(parts):
            weights = (part - whole).exp().unflatten(-1, (-1, readers.chunk_size)).sum(-1)
            chunks = weights.shape[-1]
            shares[..., slice(-chunks, None) if number else slice(chunks)] += weights * share[..., None]
    return shares * there[:, None, None, None]


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    """Of (B, H, T, D) the tokens (B, N)."""
    return tensor.gather(2, places[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _logits(query: Tensor, keys: Tensor, scores: Scores) -> Tensor:
    """Scores (R, H, n, M) float32 of queries (R, H, n, D) against keys (R, H_kv, M, D)."""
    asking = query.float().unflatten(1, (keys.shape[1], -1))
    found = torch.einsum("bhgtd,bhsd->bhgts", asking, keys.float()).flatten(1, 2) * scores.scale
    return found if scores.softcap is None else scores.softcap * torch.tanh(found / scores.softcap)


def _memory_scores(reading: Tensor, own: Tensor, memory: RetrievedKV, scores: Scores) -> list[Tensor]:
    """Scores in memory, minus infinity where nothing is read; and in what is near, if there is any."""
    far = _masked(_logits(reading, memory.keys, scores), memory.mask)
    if memory.choice is not None:
        far = memory.choice.restrict(far)
    if memory.bias is not None and memory.gate is None:
        far = far + memory.bias.detach().float()[..., None, None]
    near = memory.near
    return [far] if near is None else [far, _masked(_logits(own, near.keys, scores), near.mask)]


def _masked(found: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (R, H, n, M), minus infinity where ``mask`` (R, M) is false."""
    return found if mask is None else found.masked_fill(~mask[:, None, None], -math.inf)


def _local_lse(
    own: Tensor, key: Tensor, places: Tensor, tokens: int, local_mask: Tensor | None, scores: Scores
) -> Tensor:
    """Log-sum-exp (B, H, N) of the scores of sampled queries (B, H, N, D) against local keys (B, H_kv, S, D).

    Args:
        own: The queries.
        key: The keys.
        places: (B, N), which of all ``tokens`` queries they are.
        tokens: How many there are, the last of those that have keys.
        local_mask: (B or 1, 1, tokens, S), boolean or additive; None: causal.
        scores: How weights are made of scores.
    """
    found = _logits(own, key, scores)
    if local_mask is None:
        seen = torch.arange(key.shape[2], device=key.device) <= places[..., None] + key.shape[2] - tokens
        return found.masked_fill(~seen[:, None], -math.inf).logsumexp(-1)
    rows = local_mask[:, 0].expand(len(own), -1, -1)
    added = additive(rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2])), torch.float32)
    assert added is not None
    return (found + added[:, None]).logsumexp(-1)
