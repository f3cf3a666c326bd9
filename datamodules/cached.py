"""Batches from tokens that are all there already: any batch of any epoch is reached directly."""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_memlong.distributed import rank_and_world
from lightning_memlong.text import Batch, Windows, WindowSpec, window_offsets


class DocumentTokens(Protocol):
    """Documents as tokens, such as a :class:`datamodules.token_cache.TokenCache`."""

    name: str
    """What tells one collection from another."""
    ids: list[str]
    """What documents are called."""
    lengths: list[int]
    """Of each [tokens]."""

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, fewer at its end."""


def plan_rows(lengths: Sequence[int], documents: Sequence[int], rows: int, window: int, stride: int) -> list[list[int]]:
    """Which documents each row reads: the longest first, each to the row with least to read, so rows end together."""
    plan: list[list[int]] = [[] for _ in range(rows)]
    load = [(0, row) for row in range(rows)]
    for place in sorted(range(len(documents)), key=lambda i: -lengths[documents[i]]):
        steps, row = heapq.heappop(load)
        plan[row].append(place)
        heapq.heappush(load, (steps + len(window_offsets(lengths[documents[place]], window, stride)), row))
    return [[documents[place] for place in sorted(row)] for row in plan]


class CachedStream(Dataset[Batch]):
    """Batches of one split; each iteration is the next epoch.

    The order is a function of the documents' lengths, the seed, the epoch and the number of processes, so the whole
    position in the data is the pair (epoch, batch), and beginning at any batch costs nothing. With several processes
    the rows of all of them are planned together and each process reads its own, so all have equally many batches.

    Args:
        cache: Tokens of all documents.
        documents: Which of them to read, in this order (before shuffling).
        windows: How documents are cut and batched.
        seed: Shuffle documents with this seed; None keeps their order.
        workers: Worker processes that assemble batches ahead of time; the order does not depend on them.
    """

    def __init__(
        self,
        cache: DocumentTokens,
        documents: Sequence[int],
        windows: Windows,
        seed: int | None = None,
        workers: int = 0,
    ) -> None:
        self.cache, self.documents, self.windows = cache, list(documents), windows
        self.seed, self.workers = seed, workers
        self.epoch = 0
        self.first_batch = 0
        self._begun = False
        self._plans: dict[int, list[list[int]]] = {}
        self._steps: list[list[tuple[int, int]]] = []

    def digest(self) -> str:
        """What the order of batches depends on beside the settings: which text, cut where."""
        lengths = [self.cache.lengths[i] for i in self.documents]
        return hashlib.sha256(repr((self.cache.name, self.documents, lengths)).encode()).hexdigest()[:16]

    def position(self, epoch: int, batch: int) -> dict[str, Any]:
        """All there is to know of a place in the data."""
        return {"epoch": epoch, "batch": batch}

    def resume(self, position: dict[str, Any]) -> None:
        """Begin the next iteration there."""
        self.epoch, self.first_batch, self._begun = position["epoch"], position["batch"], False

    def longest_document(self) -> int | None:
        """Its length [tokens]; None: not known."""
        return max((self.cache.lengths[i] for i in self.documents), default=0)

    def whole_documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tokens of each document, in order."""
        for i in self.documents:
            yield self.cache.ids[i], self.cache.tokens(i, 0, self.cache.lengths[i])

    def name_of(self, document: int) -> str:
        """The name of a ``document_id``."""
        return self.cache.ids[document]

    def was_read(self) -> str:
        """How much there is has been told when the split was made."""
        return ""

    def left_out(self) -> str:
        """What was dropped has been told when the split was made."""
        return ""

    def _plan(self) -> list[list[int]]:
        world = rank_and_world()[1]
        if world not in self._plans:
            w = self.windows
            self._plans[world] = plan_rows(self.cache.lengths, self.documents, w.rows * world, w.window, w.stride)
        return self._plans[world]

    def _offsets(self, document: int) -> list[int]:
        return self.windows.offsets(self.cache.lengths[document])

    def replay_windows(self, position: dict[str, Any]) -> list[list[np.ndarray]]:
        """Of each row, the windows that were read of the document it is in the middle of at a position."""
        number, rows = position["batch"], self._rows(position["epoch"])
        places = [row[number] if number < len(row) else (0, 0) for row in rows]
        w = self.windows
        return [[self.cache.tokens(document, at, at + w.window) for at in range(0, offset, w.stride)]
                for document, offset in places]  # fmt: skip

    def _rows(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Of each of this process's rows, (document, offset) of every window of an epoch."""
        rank, rows = rank_and_world()[0], self._plan()
        if self.seed is not None:
            # Mixed within rows: so every epoch has the same number of batches, which Lightning relies on.
            mixer = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            rows = [[row[i] for i in torch.randperm(len(row), generator=mixer)] for row in rows]
        mine = rows[rank * self.windows.rows : (rank + 1) * self.windows.rows]
        return [[(document, at) for document in row for at in self._offsets(document)] for row in mine]

    def __len__(self) -> int:
        """Batches in an epoch; the same in every one and in every process."""
        return max(sum(len(self._offsets(document)) for document in row) for row in self._plan())

    def __getitem__(self, number: int) -> Batch:
        """One batch of the epoch that was begun last."""
        specs: list[WindowSpec | None] = []
        for row in self._steps:
            document, offset = row[number] if number < len(row) else (-1, 0)
            tokens = self.cache.tokens(document, offset, offset + self.windows.window) if document >= 0 else None
            specs.append(None if tokens is None else WindowSpec(document, offset, tokens))
        return self.windows.batch(specs)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from ``first_batch`` on; each further iteration is the next epoch, from its beginning."""
        # A generator's body runs at the first next(), so an iterator that is made and thrown away changes nothing.
        self.epoch += self._begun
        start, self.first_batch, self._begun = self.first_batch, 0, True
        self._steps = self._rows(self.epoch)
        # A generator of its own: making an iterator must not draw from the random state that a resume restores.
        yield from DataLoader(
            self,
            batch_size=None,
            sampler=range(start, len(self)),
            num_workers=self.workers,
            generator=torch.Generator(),
        )
