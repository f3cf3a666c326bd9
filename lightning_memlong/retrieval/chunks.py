"""Chunks that are to be embedded, seen as whatever an encoder wants of them.

Legend: m chunks, C tokens of a chunk, E hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass
class Chunks:
    """Some chunks, on the CPU."""

    tokens: Tensor
    """(m, C) token ids of the backbone."""
    lengths: Tensor
    """(m,) real tokens of each."""
    decode: Callable[[Sequence[Tensor]], list[str]]
    """The backbone's tokenizer: tokens into text."""
    hidden: Tensor | None = None
    """(m, C, E) float32, states of the frozen memory layer, if they were computed."""

    @cached_property
    def texts(self) -> list[str]:
        """What the chunks say; decoded when it is asked for."""
        return self.decode([ids[:length] for ids, length in zip(self.tokens, self.lengths, strict=True)])
