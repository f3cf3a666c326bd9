"""Each token and head chooses which of the retrieved chunks it reads, by the log-sum-exp of its own scores in each.

That is the attention mass a chunk would get, so what is left out is what would have counted least. The encoder names
the candidates, attention chooses among them (arXiv 2402.04617 and 2407.09450 choose per layer for a block of tokens).

Legend: R rows, H query heads, H_kv key/value heads, T tokens, n chunks of C tokens, M = n * C, D head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Queries whose scores exist at a time [tokens]: those of 64 chunks of 128 tokens are 4 MB."""


@dataclass(frozen=True)
class Choice:
    """How much a token reads of what was retrieved."""

    chunk_size: int
    """C."""
    top_k: int
    """Chunks that each token and head reads."""

    @torch.no_grad()
    def keep(self, mass: Tensor) -> Tensor:
        """Which chunks are read (..., n) bool, given the attention mass of each (or its logarithm)."""
        best = mass.topk(min(self.top_k, mass.shape[-1]), dim=-1).indices
        return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, True)

    def restrict(self, scores: Tensor) -> Tensor:
        """Scores (..., M), minus infinity in the chunks that are not read."""
        chunks = scores.detach().unflatten(-1, (-1, self.chunk_size)).logsumexp(-1)
        kept = self.keep(chunks).repeat_interleave(self.chunk_size, dim=-1)
        return scores.masked_fill(~kept, -math.inf)


@torch.no_grad()
def attend_chosen(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, choice: Choice
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of queries to the chunks they choose, head by head so that scores stay in cache.

    Args:
        query: (R, H, T, D).
        key: (R, H_kv, M, D).
        value: Shaped as ``key``.
        bias: (R, 1, 1, M), added to scores; None: nothing.
        scale: Factor on scores.
        choice: How many are chosen.

    Returns:
        Output (R, H, T, D), log-sum-exp (R, H, T) float32, and what was read (R, H, T, n) bool.
    """
    rows, heads, tokens, _ = query.shape
    group, chunks = heads // key.shape[1], key.shape[2] // choice.chunk_size
    output = torch.empty_like(query)
    lse = query.new_empty(rows, heads, tokens, dtype=torch.float32)
    kept = query.new_empty(rows, heads, tokens, chunks, dtype=torch.bool)
    for row in range(rows):
        added = None if bias is None else bias[row, 0].float()
        for head in range(heads):
            keys, values = (t[row, head // group].float() for t in (key, value))
            for start in range(0, tokens, BLOCK):
                here = (row, head, slice(start, start + BLOCK))
                scores = torch.mm(query[here].float(), keys.T).mul_(scale)
                scores = scores if added is None else scores.add_(added)
                top = scores.amax(-1, keepdim=True)
                weights = scores.sub_(top).exp_().unflatten(-1, (chunks, -1))
                mass = weights.sum(-1)
                kept[here] = keep = choice.keep(mass)
                total = (mass * keep).sum(-1, keepdim=True)
                weights.mul_(keep[..., None])
                output[here] = torch.mm(weights.flatten(1), values).div_(total)
                lse[here] = (total.log() + top)[:, 0]
    return output, lse, kept
