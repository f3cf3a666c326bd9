"""The record a bank hands to a model.

R rows (G times the batch's where each of G groups of a row's tokens has its own), k chunks of C tokens, M = k * C,
L layers, H heads, D head size.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.bank.transfer import Arriving


@dataclass
class Retrieved:
    """What a bank gathered for one window, in document order. Nothing in it is ever modified."""

    keys: Tensor
    """(R, H, M, D) before rotary embedding; (L, R, H, M, D) from a bank of several layers."""
    values: Tensor
    """Shaped as ``keys``."""
    mask: Tensor
    """(R, M) bool, true where a token is real."""
    scores: Tensor
    """(R, k) float32 similarity; NaN where nothing was retrieved or the selection has no score."""
    entries: Tensor
    """(R, k) places of the entries in their rows, oldest = 0; -1 where nothing was retrieved from the row itself."""
    positions: Tensor
    """(R, k) first token of each chunk in its document [tokens]; -1 where nothing was retrieved from the document."""
    empty: bool | None = None
    """Whether no token is real; None: it is looked up in ``mask``, once. A bank knows without asking the device."""
    full: bool | None = None
    """Whether all tokens are real; likewise."""

    begin: Tensor | None = None
    """(R,) place in the document of the first token of the window that reads [tokens]; None: nobody knows."""
    top_k: int | None = None
    """Chunks of these that each token and head reads, by its own scores; None: all."""
    length: Tensor | None = None
    """(B,) real tokens of the window that reads; None: all."""
    asked: bool = False
    """Whether a text asked, such as a question, and not what stands before a window: what was found is to be heard."""
    count_attention: bool = False
    """Whether its chunks are yet to be counted as used, by the attention they get: the pass is to tell it."""

    def __post_init__(self) -> None:
        """Look up what was not given."""
        if self.empty is None:
            self.empty = self.mask.shape[1] == 0 or not bool(self.mask.any())
        if self.full is None:
            self.full = bool(self.mask.all())

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or what another process gets, has keys and values, whatever this one waits for or joins.
        return Retrieved, tuple(getattr(self, field.name) for field in fields(Retrieved))

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk, C."""
        return self.mask.shape[1] // self.positions.shape[1]

    def readers(self, rows: int) -> Tensor:
        """(B,) bool: which of so many rows have a token of memory to read."""
        return self.mask.view(rows, -1).any(dim=1)

    def mean_over_readers(self, values: Tensor) -> Tensor:
        """The mean of what was measured of each row (B, ...) over :meth:`readers`."""
        read = self.readers(len(values)).to(values.device)
        summed = (values * read.view(-1, *[1] * (values.dim() - 1))).sum(dim=0)
        return summed / read.sum().clamp(min=1)


class PendingRetrieved(Retrieved):
    """A record whose keys and values are still being read; whoever asks for them waits until they are there.

    Args:
        pending: Reads keys and values, (L, R, H, M, D) each.
        one_layer: Whether they are of a bank of one layer, L = 1, which is left out.
        **facts: The other fields of :class:`Retrieved`.
    """

    _pending: "Future[Arriving]"
    _one_layer: bool

    def __init__(self, pending: "Future[Arriving]", one_layer: bool, **facts: Any) -> None:
        vars(self).update(facts, _pending=pending, _one_layer=one_layer)

    @cached_property
    def _arrived(self) -> Sequence[Tensor]:
        tensors = self._pending.result().on_device()
        return [t[0] for t in tensors] if self._one_layer else tensors

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """See :class:`Retrieved`."""
        return self._arrived[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """See :class:`Retrieved`."""
        return self._arrived[1]


class JoinedRetrieved(Retrieved):
    """What a row's own document gave, and before it, further from the window, what other documents gave.

    Scores, entries and positions (NaN, -1, -1) tell of the own document only. Keys and values are joined when they are
    first asked for, so that what is still being read is not waited for.

    Args:
        others: Of other documents, at least one record.
        own: Of the own one, if it gave anything.
    """

    _parts: Sequence[Retrieved]

    def __init__(self, others: Sequence[Retrieved], own: Retrieved | None) -> None:
        parts = [*others] if own is None else [*others, own]
        scores = [torch.full_like(part.scores, float("nan")) for part in others]
        nothing = [torch.full_like(part.entries, -1) for part in others]
        mine = ([], [], []) if own is None else ([own.scores], [own.entries], [own.positions])
        vars(self).update(
            scores=torch.cat([*scores, *mine[0]], dim=1),
            entries=torch.cat([*nothing, *mine[1]], dim=1),
            positions=torch.cat([*nothing, *mine[2]], dim=1),
            mask=torch.cat([part.mask for part in parts], dim=1),
            full=all(part.full for part in parts),
            empty=all(part.empty for part in parts),
            _parts=parts,
        )

    @cached_property
    def keys(self) -> Tensor:  # type: ignore[override]
        """See :class:`Retrieved`."""
        return torch.cat([part.keys for part in self._parts], dim=-2)

    @cached_property
    def values(self) -> Tensor:  # type: ignore[override]
        """See :class:`Retrieved`."""
        return torch.cat([part.values for part in self._parts], dim=-2)
