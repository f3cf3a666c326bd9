"""Windows: where a document is cut, and how the windows of several documents become one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]


def window_offsets(length: int, window: int, stride: int) -> list[int]:
    """Where the windows of a document of ``length`` tokens begin.

    The first window is scored whole, each later one on its last ``stride`` tokens, so that every token is
    scored once and, past the first window, sees at least ``window - stride`` tokens before it.
    """
    extra = max(0, length - window)
    return [i * stride for i in range(1 + -(-extra // stride))]


class Place(NamedTuple):
    """A window of a document."""

    document: int
    """The document's id, as it stands in ``document_id``."""
    offset: int
    """Where the window begins [tokens]."""
    tokens: np.ndarray
    """What it holds: up to ``window`` token ids."""


@dataclass(frozen=True)
class Windows:
    """How documents are cut and batched."""

    window: int
    """Tokens a step sees."""
    stride: int
    """Tokens a step advances."""
    rows: int
    """Documents read side by side."""
    pad: int = 0
    """Token id for padding."""

    def offsets(self, length: int) -> list[int]:
        """Where the windows of a document of ``length`` tokens begin."""
        return window_offsets(length, self.window, self.stride)

    def batch(self, places: Sequence[Place | None]) -> Batch:
        """A batch as the head of :mod:`datamodules.documents` describes it; a row of None is all padding."""
        rows = [self._row(place) for place in places]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, place: Place | None) -> Batch:
        ids = torch.full((self.window,), self.pad, dtype=torch.long)
        labels = torch.full((self.window,), -100, dtype=torch.long)
        document, offset, tokens = place or Place(-1, 0, np.zeros(0, np.int64))
        length = len(tokens)
        fresh = 0 if offset == 0 else self.window - self.stride
        ids[:length] = torch.from_numpy(tokens.astype(np.int64))
        labels[fresh:length] = ids[fresh:length]
        labels[0] = -100  # nothing in the window to predict it from
        facts = {"length": length, "document_start": place is not None and offset == 0}
        facts |= {"document_id": document, "offset": offset, "fresh": fresh}
        return {"input_ids": ids, "labels": labels} | {k: torch.tensor(v) for k, v in facts.items()}
