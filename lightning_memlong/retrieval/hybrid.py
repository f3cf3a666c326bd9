"""Retrieval by meaning and by words at once: the sum of standardised scores, as one inner product.

Fusion by sum (CombSUM; Fox and Shaw, 1994) of z-scores (Renda and Straccia, 2003), instead of reciprocal ranks
(Cormack et al., 2009): a sum of inner products is an inner product, so that one search finds by it, in any index.

Legend: n chunks that ask, N candidates, E size of a part, S sum of both sizes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.retrieval.chunks import Chunks

WORDS = 4096
"""Length of the part for words: half of what ``bm25`` alone takes, as all of it is stored with every chunk."""


class HybridRetriever:
    """Two retrievers as one: an embedding is [meaning | words].

    What asks is each part's query over the standard deviation of that part's scores among the candidates. The inner
    product of both is the sum of the two z-scores but for their means, which are the same for all candidates.

    Args:
        meaning: An encoder of texts.
        words: Another one, BM25.
    """

    needs_hidden = False

    def __init__(self, meaning: Any, words: Any) -> None:
        self.parts = (meaning, words)
        self.size = meaning.size + words.size

    def embed(self, chunks: Chunks) -> Tensor:
        """As :meth:`encode`, of chunks."""
        return self.encode(chunks.texts)

    def encode(self, texts: list[str]) -> Tensor:
        """Both embeddings side by side (n, S), float32; not of unit length."""
        return torch.cat([part.encode(texts) for part in self.parts], dim=1)

    def as_query(self, asking: Tensor, candidates: Callable[[], Tensor]) -> Tensor:
        """What chunks ask with (n, S), with both parts' scores among the known chunks (N, S) spread alike."""
        stored = self._split(candidates())
        split = zip(self.parts, self._split(asking), stored, strict=True)
        return torch.cat([_standardised(part.as_query(asks, lambda of=of: of), of) for part, asks, of in split], dim=1)

    def _split(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        return embeddings.split([part.size for part in self.parts], dim=1)

    def to(self, device: torch.device) -> "HybridRetriever":
        """Move what has something to move."""
        for part in self.parts:
            part.to(device)
        return self


def _standardised(queries: Tensor, stored: Tensor) -> Tensor:
    """Queries (n, E) whose scores among the stored (N, E) have standard deviation one; zeros where all score alike."""
    scores = queries @ stored.T
    if not len(stored):
        return torch.zeros_like(queries)
    spread = scores.std(dim=1, correction=0, keepdim=True)
    # Equal scores differ by rounding, which must not be blown up into an order.
    alike = spread <= 1e-6 * scores.abs().amax(dim=1, keepdim=True)
    return torch.where(alike, 0.0, queries / spread)
