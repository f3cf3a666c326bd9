"""How well chunks could be chosen: each candidate tried by what it does to the scored tokens themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.scoring import score_windows
from lightning_memlong.retrieval import Retrieval, seed_of


def choose_with_hindsight(
    subject: Subject,
    batch: dict[str, Any],
    candidates: int,
    retrievals: Mapping[str, Retrieval],
    banks: Mapping[str, BankView],
    limit: Tensor,
) -> Retrieved | None:
    """The ``top_k`` chunks that, each on its own, lower the loss of the scored tokens most.

    The best set of chunks is not the set of the best chunks, and not all chunks are tried, so this is a lower bound of
    the upper bound. The candidates are what the settings would choose, in turn, and then random ones.

    Args:
        subject: Whose model.
        batch: The windows.
        candidates: Chunks tried for each document.
        retrievals: The settings; ``top_k`` is that of the first.
        banks: Theirs; all hold the same chunks.
        limit: (R,) loss with memory off; chunks that do not lower it are left out.
    """
    first = next(iter(retrievals))
    top_k, bank = retrievals[first].config.top_k, banks[first]
    pool = _pool(batch, candidates, retrievals, banks)
    gains = torch.full(pool.shape, float("-inf"))
    for place in range(pool.shape[1]):
        memory = retrievals[first].gather(bank, pool[:, place : place + 1], count=False, begin=batch["offset"].cpu())
        losses = score_windows(subject, batch, memory)[0]
        gains[:, place] = -losses.sum(1)
    gains[pool < 0] = float("-inf")
    best = gains.topk(min(top_k, pool.shape[1]), dim=1)
    chosen = pool.gather(1, best.indices)
    chosen[best.values <= -limit[:, None]] = -1
    return retrievals[first].gather(bank, chosen, count=False, begin=batch["offset"].cpu())


def _pool(
    batch: dict[str, Any], candidates: int, retrievals: Mapping[str, Retrieval], banks: Mapping[str, BankView]
) -> Tensor:
    """(R, candidates) places, -1 where a document has fewer chunks."""
    rankings = []
    for name, retrieval in retrievals.items():
        rankings.append(retrieval.choose(banks[name], batch)[1][:, 0])
    start, before = batch["memory_start"].cpu(), batch["offset"].cpu()
    bank = next(iter(banks.values()))
    places = zip(batch["document_id"].tolist(), before.tolist(), strict=True)
    rankings.append(bank.random(candidates, [seed_of(*place) for place in places], before, start))
    pool = torch.full((len(before), candidates), -1)
    for row in range(len(before)):
        turns = (int(r[row, i]) for i in range(max(r.shape[1] for r in rankings)) for r in rankings if i < r.shape[1])
        found = list(dict.fromkeys(place for place in turns if place >= 0))[:candidates]
        pool[row, : len(found)] = torch.tensor(found)
    return pool
