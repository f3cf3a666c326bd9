"""Windows: where a document is cut, and how the windows of several documents become one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from typing_extensions import NotRequired


class WindowBatch(TypedDict):
    """One window of each of B rows. Tokens go to the device; facts of a window stay on the host, where they are used.

    Row b continues row b of the batch before it until its document ends; a window never holds two documents; the
    short last window of a document is padded on the right and masked.
    """

    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64, aligned with ``input_ids``; -100 where not scored."""
    length: Tensor
    """(B,) real tokens of the window [tokens]."""
    document_start: Tensor
    """(B,) bool, whether the window begins its document."""
    document_id: Tensor
    """(B,) which document; -1 for a row of padding."""
    offset: Tensor
    """(B,) where the window begins in its document [tokens]."""
    overlap: Tensor
    """(B,) tokens at its beginning that belong to the window before, and are neither scored nor stored again."""
    tokens: NotRequired[Tensor]
    """(B, T) what ``input_ids`` are, on the host: for the encoder's texts, so that nothing is brought back."""
    memory_start: NotRequired[Tensor]
    """(B,) only entries that begin there or after it are retrieved [tokens]."""
    planted: NotRequired[Tensor]
    """(B, 2) first token and the place after the last of what a window asks for in its document; -1: nothing."""
    embeddings: NotRequired[Any]
    """(B, n, E) of the window's chunks, where queries needed them before it was read; or a future that gives them."""
    memory: NotRequired[Any]
    """What the bank gathered for the window, a ``Retrieved`` or None; put there by the MemoryBankCallback."""


Batch = dict[str, Any]
"""A :class:`WindowBatch` while it is put together, and as Lightning's hooks see it."""
ON_DEVICE = ("input_ids", "labels")
"""Of a batch, what the network reads."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with what the network reads on its device, and the tokens on the host as well."""
    read = {name: sent(batch[name], device) for name in ON_DEVICE if name in batch}
    return {**batch, "tokens": batch["input_ids"], **read}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU is not waited for, others might find it gone (PyTorch 139550)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def window_offsets(length: int, window: int, stride: int) -> list[int]:
    """Where the windows of a document of ``length`` tokens begin.

    The first window is scored whole, each later one on its last ``stride`` tokens, so that every token is
    scored once and, past the first window, sees at least ``window - stride`` tokens before it.
    """
    extra = max(0, length - window)
    return [i * stride for i in range(1 + -(-extra // stride))]


class WindowSpec(NamedTuple):
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

    def batch(self, specs: Sequence[WindowSpec | None]) -> Batch:
        """The windows of all rows as one :class:`WindowBatch`; a row of None is all padding."""
        rows = [self._row(spec) for spec in specs]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, spec: WindowSpec | None) -> Batch:
        ids = torch.full((self.window,), self.pad, dtype=torch.long)
        labels = torch.full((self.window,), -100, dtype=torch.long)
        document, offset, tokens = spec or WindowSpec(-1, 0, np.zeros(0, np.int64))
        length = len(tokens)
        assert spec is None or length > 0, f"window at {offset} of document {document} is empty: its loss would be 0"
        overlap = 0 if offset == 0 else self.window - self.stride
        ids[:length] = torch.from_numpy(tokens.astype(np.int64))
        labels[overlap:length] = ids[overlap:length]
        labels[0] = -100  # nothing in the window to predict it from
        facts = {"length": length, "document_start": spec is not None and offset == 0}
        facts |= {"document_id": document, "offset": offset, "overlap": overlap}
        return {"input_ids": ids, "labels": labels} | {k: torch.tensor(v) for k, v in facts.items()}
