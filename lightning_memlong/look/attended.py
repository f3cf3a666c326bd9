"""What tokens retrieved, and the attention that each head gave it.

Legend: L retrieval layers, H heads, n tokens, k chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.bank import BankView
from lightning_memlong.model import WatchedSet


@dataclass(frozen=True)
class Chunk:
    """A chunk that was retrieved."""

    start: int
    """Its first token [tokens]."""
    end: int
    """The place after its last one [tokens]."""
    similarity: float
    """To what asked; NaN where the selection has none."""
    text: str


@dataclass(frozen=True)
class Attended:
    """Chunks, and how they were read."""

    chunks: list[Chunk]
    """In the order of the document."""
    layers: list[int]
    """Those that read memory."""
    attention: Tensor
    """(L, H, n, k) float32, share of its attention that a head gives a chunk, token by token."""

    def share(self) -> Tensor:
        """(k,) share of attention that each chunk gets, mean over layers, heads and tokens."""
        return self.attention.mean((0, 1, 2)) if self.attention.numel() else torch.zeros(len(self.chunks))

    def by_token(self) -> Tensor:
        """(k, n) the same, token by token."""
        return self.attention.mean((0, 1)).T

    def by_head(self, chunk: int | None = None) -> dict[int, Tensor]:
        """Layer -> (H,) mean over tokens of the share of a chunk (its place in ``chunks``); None: of all memory."""
        every = self.attention if chunk is None else self.attention[..., chunk : chunk + 1]
        return dict(zip(self.layers, every.sum(-1).mean(2), strict=True))


def attended(sets: Sequence[WatchedSet], tokens: int, bank: BankView, tokenizer: Any) -> Attended:
    """What a row's tokens attended to, out of what was watched.

    Args:
        sets: What was retrieved, one after the other, by passes of one row.
        tokens: n; the first so many that were watched.
        bank: Of one row, where the chunks are from.
        tokenizer: Turns them back into text.
    """
    sets = [one for one in sets if one.passes]
    passes = [(one.positions[0].tolist(), layers) for one in sets for layers in list(one.passes)]
    passes = [one for one in passes if len(one[1]) == len(passes[0][1])]  # the last may be under way
    similar: dict[int, float] = {}
    for one in sets:
        for place, score in zip(one.positions[0].tolist(), one.scores[0].tolist(), strict=True):
            if place >= 0:
                similar[place] = max(score, similar.get(place, score))
    starts = sorted(similar)
    layers = sorted(passes[0][1]) if passes else []
    columns = {start: number for number, start in enumerate(starts)}
    rows = []
    for positions, seen in passes:
        shares = torch.stack([seen[layer][0] for layer in layers])  # (L, H, n of the pass, k of its set)
        row = shares.new_zeros(*shares.shape[:3], len(starts))
        real = [i for i, place in enumerate(positions) if place >= 0]
        row[..., [columns[positions[i]] for i in real]] = shares[..., real]
        rows.append(row)
    attention = torch.cat(rows, dim=2)[:, :, :tokens] if rows else torch.zeros(0, 0, tokens, 0)
    return Attended([_chunk(start, similar[start], bank, tokenizer) for start in starts], layers, attention)


def _chunk(start: int, similarity: float, bank: BankView, tokenizer: Any) -> Chunk:
    facts = bank.entries(0)
    lengths = facts.lengths[facts.positions == start].tolist() or [bank.chunk_size]
    end = start + int(lengths[0])
    return Chunk(start, end, similarity, tokenizer.decode(bank.row(0).tokens[start:end]))
