"""Chunks of other documents beside those of the own one, so that training teaches to tell them apart.

Focused Transformer (arXiv 2307.03170) trains so, and calls it crossbatch: its d documents are the own one and d - 1
others.

Legend: R rows, G sets of a row (1, or one a chunk of the window), k chunks of a set.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_memlong.bank import JoinedRetrieved, Retrieved
from lightning_memlong.retrieval.selection import Request, Selector


def with_distractors(
    select: Selector, request: Request, own: Retrieved | None, documents: Tensor, count: int
) -> Retrieved | None:
    """What the own document gave, with as many chunks from each of ``count`` other rows of the bank.

    The same selector chooses them with the same queries, out of all that the other row holds. No counter goes up: they
    were not retrieved for what they are. Nothing is drawn, so that a resumed run meets the same ones.

    Args:
        select: Chooses entries.
        request: What the window asks its own row of R rows.
        own: What that gave.
        documents: (R,) which document each row reads; -1: none any more.
        count: Other rows, the next ones going round; fewer than R.
    """
    others = (_from_others(select, request, documents, shift) for shift in range(count, 0, -1))
    found = [other for other in others if other is not None]
    return JoinedRetrieved(found, own) if found else own


def _from_others(select: Selector, request: Request, documents: Tensor, shift: int) -> Retrieved | None:
    """What the window of row r finds in row r + ``shift``."""
    bank = request.bank.rolled(shift)
    # All of the other document lies before its own end; where this row's window begins says nothing about it.
    scores, entries = select(replace(request, bank=bank, before=bank.ends(), after=None))
    theirs = documents.roll(-shift)
    # Two epochs can meet in one batch: the same document may hold the text this row is to predict. Of a row that has
    # read all, nobody says what its bank holds.
    foreign = (theirs != documents) & (theirs >= 0)
    return bank.gather(torch.where(foreign[:, None, None], entries, -1), scores, count=False)
