"""Watching attention: what each head gives each retrieved chunk, token by token, in passes of any kind.

Legend: R rows of a record, H query heads, n tokens watched, k chunks retrieved.
"""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_memlong.attention import Readers
from lightning_memlong.bank import Retrieved
from lightning_memlong.text import sent


@dataclass
class WatchedSet:
    """What was retrieved once, and the attention it got in each pass that read it."""

    positions: Tensor
    """(R, k) first token of each chunk in its document [tokens]; -1 where nothing was retrieved."""
    scores: Tensor
    """(R, k) similarity; NaN where the selection has none."""
    readers: Readers
    """Whose attention is told."""
    passes: list[dict[int, Tensor]] = field(default_factory=list)
    """Of each pass, layer -> share of attention (R, H, n, k) float32, on the CPU."""

    def note(self, layer: int, shares: Tensor) -> None:
        """Keep what a layer gave; one that has said so already begins another pass."""
        if not self.passes or layer in self.passes[-1]:
            self.passes.append({})
        self.passes[-1][layer] = shares.cpu()


class Watch:
    """Sets of chunks as they were retrieved, and what attention they got.

    Args:
        last: How many of a pass's tokens are watched, the last ones [tokens].
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.sets: list[WatchedSet] = []

    def begin(self, retrieved: Retrieved) -> WatchedSet:
        """A set that passes to come will read."""
        lengths = None if retrieved.length is None else sent(retrieved.length, retrieved.mask.device)
        readers = Readers(retrieved.chunk_size, retrieved.positions.shape[1], lengths, self.last)
        self.sets.append(WatchedSet(retrieved.positions, retrieved.scores, readers))
        return self.sets[-1]
