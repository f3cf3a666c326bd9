"""Retrieval by words: BM25 (Robertson and Zaragoza, 2009) as an inner product, so that any index finds by it."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_memlong.retrieval.chunks import Chunks

SATURATION = 1.5
"""BM25's k1: how soon a word that is repeated counts no more."""


class BM25Retriever:
    """BM25 over the chunks of a row; needs no model.

    A chunk's embedding holds, for each word, its saturated count; what asks holds, for each word, how rare it is among
    the chunks of the row. Their inner product is BM25 without its correction for length: all chunks are equally long.

    Args:
        size: Length of an embedding; words are hashed to places in it, and few of a document's share one.
    """

    def __init__(self, size: int = 8192) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self.size = size
        self._vectorizer = HashingVectorizer(n_features=size, norm=None, alternate_sign=False)

    needs_hidden = False

    def embed(self, chunks: Chunks) -> Tensor:
        """As :meth:`encode`, of chunks."""
        return self.encode(chunks.texts)

    def encode(self, texts: list[str]) -> Tensor:
        """Saturated counts (n, size), float32; not of unit length."""
        counts = torch.from_numpy(self._vectorizer.transform(texts).toarray()).float()
        return counts * (SATURATION + 1) / (counts + SATURATION)

    def as_query(self, asking: Tensor, candidates: Callable[[], Tensor]) -> Tensor:
        """The words of the chunks that ask (n, size), each with its weight among the known chunks (N, size)."""
        chunks = candidates()
        frequency = (chunks > 0).sum(dim=0)
        rarity = torch.log1p((len(chunks) - frequency + 0.5) / (frequency + 0.5))
        return (asking > 0) * rarity

    def to(self, device: torch.device) -> "BM25Retriever":
        """Nothing to move."""
        return self
