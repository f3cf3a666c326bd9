"""What a window, or each of its chunks, retrieves with: embeddings of the text before it (paper, section 2).

Legend: R rows, G searches of a row, n chunks of a window, Q queries of a search, k chunks retrieved, E embedding size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank import BankView

Candidates = Callable[[], Tensor]
"""Gives the embeddings (N, E) of all chunks of a row that can be found: a copy, so only made for who asks."""


@dataclass(frozen=True)
class QueryBuilder:
    """How the chunks before a place become queries."""

    count: int
    """Chunks that ask."""
    pooling: str = "mean"
    """``mean``: they ask together, with their mean; ``max``: each asks for itself, and an entry is as similar as it is
    to the nearest."""
    as_query: Callable[[Tensor, Candidates], Tensor] = lambda asking, candidates: asking
    """Turns what is stored of the chunks that ask (n, E) into queries; may ask for what is stored of all chunks."""

    def __call__(self, held: Tensor, candidates: Candidates) -> Tensor:
        """Queries (Q, E) of the last chunks of ``held`` (n, E); zeros where there is none."""
        queries = 1 if self.pooling == "mean" else self.count
        if not len(held):
            return held.new_zeros(queries, held.shape[1])
        asking = self.as_query(held[-self.count :], candidates)
        if self.pooling == "mean":
            return F.normalize(asking.mean(dim=0, keepdim=True), dim=1)
        missing = self.count - len(asking)  # the same query twice finds the same
        return F.normalize(torch.cat([asking[:1].expand(missing, -1), asking]), dim=1)


def window_queries(bank: BankView, place: Tensor, build: QueryBuilder, candidates: Sequence[Candidates]) -> Tensor:
    """Queries (R, 1, Q, E) of the last chunks before ``place`` (R,); ``candidates``: of each row, what can be found.

    That is where the tokens begin which are predicted, be it in the middle of a window that overlaps the one before.
    """
    held = bank.last_embeddings(build.count, place)
    return torch.stack([build(last, of_row) for last, of_row in zip(held, candidates, strict=True)])[:, None]


def chunk_queries(
    bank: BankView,
    embeddings: Tensor,
    offset: Tensor,
    overlap: Tensor,
    build: QueryBuilder,
    candidates: Sequence[Candidates],
) -> Tensor:
    """Queries of each chunk of the window (R, n, Q, E): of the chunks before that chunk.

    They lie in the bank, or in the window itself before the chunk, so a token never retrieves with text that comes
    after it.

    Args:
        bank: Of R rows.
        embeddings: (R, n, E) of the window's chunks; those stored with an earlier window are not looked at.
        offset: (R,) where the window begins in its document [tokens].
        overlap: (R,) how many of its tokens were stored with an earlier window [tokens].
        build: How chunks ask.
        candidates: Of each row, all that can be found.
    """
    already = overlap // bank.chunk_size
    stored = bank.last_embeddings(build.count + int(already.max()), offset + overlap)
    rows = []
    for row, held in enumerate(stored):
        line = torch.cat([held, embeddings[row, int(already[row]) :]])
        first = len(held) - int(already[row])  # where the window's first chunk stands in the line
        asked = [build(line[: max(0, first + chunk)], candidates[row]) for chunk in range(embeddings.shape[1])]
        rows.append(torch.stack(asked))
    return torch.stack(rows)


def search_any(
    bank: BankView, queries: Tensor, top_k: int, before: Tensor, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and places (R, G, k) of the entries nearest to any of the queries (R, G, Q, E), best first.

    See :meth:`MemoryBank.search` for the rest.
    """
    rows, groups, count, size = queries.shape
    scores, entries = bank.search(queries.reshape(rows, groups * count, size), top_k, before, after)
    scores, entries = (t.view(rows, groups, -1) for t in (scores, entries))
    if count == 1:
        return scores, entries
    return _distinct(scores, entries, top_k)


def _distinct(scores: Tensor, entries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Of each list (..., m), every entry once, with its best score: exact, as each query has brought its ``top_k``."""
    order = scores.nan_to_num(float("-inf")).argsort(dim=-1, descending=True, stable=True)
    scores, entries = scores.gather(-1, order), entries.gather(-1, order)
    kept_scores = scores.new_full((*scores.shape[:-1], top_k), float("nan"))
    kept = entries.new_full(kept_scores.shape, -1)
    for place in torch.cartesian_prod(*map(torch.arange, scores.shape[:-1])).tolist():
        at = tuple(place)
        first = {entry: i for i, entry in reversed(list(enumerate(entries[at].tolist()))) if entry >= 0}
        chosen = torch.tensor(sorted(first.values())[:top_k], dtype=torch.long)
        kept_scores[(*at, slice(len(chosen)))] = scores[at][chosen]
        kept[(*at, slice(len(chosen)))] = entries[at][chosen]
    widest = int((kept >= 0).sum(-1).max()) if kept.numel() else 0
    return kept_scores[..., :widest], kept[..., :widest]
