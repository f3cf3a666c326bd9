"""What a window, or each of its chunks, retrieves with: embeddings of the text before it (paper, section 2).

Legend: R rows, n chunks of a window, C tokens of a chunk, E embedding size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank import MemoryBank


def window_queries(bank: MemoryBank, place: Tensor, count: int) -> Tensor:
    """One query a row (R, E): the mean of the last ``count`` chunks before ``place`` (R,).

    That is where the tokens begin which are predicted, be it in the middle of a window that overlaps the one before.
    """
    means = [_mean(held) for held in bank.last_embeddings(count, place)]
    return F.normalize(torch.stack(means), dim=1)


def chunk_queries(bank: MemoryBank, embeddings: Tensor, offset: Tensor, fresh: Tensor, count: int) -> Tensor:
    """One query a chunk of the window (R, n, E): the mean of the ``count`` chunks before that chunk.

    They lie in the bank, or in the window itself before the chunk, so a token never retrieves with text that comes
    after it.

    Args:
        bank: Of R rows.
        embeddings: (R, n, E) of the window's chunks; those stored with an earlier window are not looked at.
        offset: (R,) where the window begins in its document [tokens].
        fresh: (R,) how many of its tokens were stored with an earlier window [tokens].
        count: Chunks averaged.
    """
    already = fresh // bank.chunk_size
    stored = bank.last_embeddings(count + int(already.max()), offset + fresh)
    queries = torch.zeros_like(embeddings)
    for row, held in enumerate(stored):
        line = torch.cat([held, embeddings[row, int(already[row]) :]])
        first = len(held) - int(already[row])  # where the window's first chunk stands in the line
        for chunk in range(embeddings.shape[1]):
            end = max(0, first + chunk)
            queries[row, chunk] = _mean(line[max(0, end - count) : end])
    return F.normalize(queries, dim=2)


def _mean(embeddings: Tensor) -> Tensor:
    return embeddings.mean(dim=0) if len(embeddings) else embeddings.new_zeros(embeddings.shape[1])
