"""What attention with memory is given.

Legend: B rows, G groups of tokens with a memory of their own, H query heads, T local tokens, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.attention.choice import Choice


@dataclass(frozen=True)
class RetrievedKV:
    """What a layer attends to beside its local tokens; shapes as for ``retrieval_causal_attention``."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    prefix: int = 0
    """Local tokens at the beginning that do not read memory: the first token of a text, put before each window."""
    gate: Tensor | None = None
    """(H,) for fusion ``gated``; None for ``joint``."""
    query: Tensor | None = None
    """(B, H, T - prefix, D), what memory is read with, if not with the query of the local part."""
    bias: Tensor | None = None
    """(H,) or (B * G, H), added to all scores of a head in memory, for ``joint``."""
    choice: Choice | None = None
    """How many chunks each token and head reads; None: all."""
    near: "RetrievedKV | None" = None
    """More memory, right before the window: read by all tokens with the query of the local part, without bias.
    Only its keys, values and mask count."""

    def to(self, dtype: torch.dtype) -> "RetrievedKV":
        """The same with keys and values of another type."""
        near = None if self.near is None else self.near.to(dtype)
        return replace(self, keys=self.keys.to(dtype), values=self.values.to(dtype), near=near)

    def real(self) -> Tensor:
        """(B * G, M) bool, which tokens are real."""
        if self.mask is None:
            return self.keys.new_ones(len(self.keys), self.keys.shape[2], dtype=torch.bool)
        return self.mask

    def reading(self, query: Tensor) -> Tensor:
        """The query memory is read with, given that of the local part."""
        return query[:, :, self.prefix :] if self.query is None else self.query


@dataclass(frozen=True)
class Scores:
    """How attention weights are made of scores."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


class Memo:
    """Forms of masks that all layers of one pass share, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], tuple[Any, Any]] = {}

    def __call__(self, form: str, mask: Tensor | None, make: Callable[[], Any]) -> Any:
        """The form of ``mask`` by that name."""
        kept = self._made.get((form, id(mask)))
        if kept is None or kept[0] is not mask:  # an identity may be given to another mask once its own is gone
            kept = self._made[form, id(mask)] = (mask, make())
        return kept[1]
