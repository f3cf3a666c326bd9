"""Documents read into banks one group after the other; what two in a row begin with in common is read once.

Legend: R rows read side by side, T tokens of a document, n chunks, E embedding size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, cat

from lightning_memlong.bank import BankView
from lightning_memlong.evaluation import Subject
from lightning_memlong.generation import Span, read_windows, reading_stride
from lightning_memlong.retrieval import Retrieval


class SharedReading:
    """A bank of R rows that holds one group of documents after the other, as if each had been read by itself.

    Args:
        subject: Who reads.
        retrievals: Ways of choosing; each encoder embeds every chunk once.
        window: Tokens read at once.
        rows: R.
        longest: Most tokens of a document.
    """

    def __init__(self, subject: Subject, retrievals: Sequence[Retrieval], window: int, rows: int, longest: int) -> None:
        self._subject, self._retrievals, self._window = subject, retrievals, window
        self._bank = retrievals[0].new_bank(rows, longest)
        self._held = [np.empty(0, np.int64)] * rows
        self.tokens = 0
        """Read by the last call, of all rows; what was there already left out."""
        self._encoders = {id(r.retriever): r for r in retrievals}
        self._embedded: dict[int, list[Tensor]] = {name: [] for name in self._encoders}

    @property
    def _chunk(self) -> int:
        return self._bank.chunk_size

    def read(self, documents: Sequence[np.ndarray]) -> list[BankView]:
        """Banks with the documents, up to R times (T,), in their rows: one for each way of choosing.

        Their keys and values are the same tensors; they hold them until the next call.
        """
        stride = reading_stride(self._window, self._chunk)
        documents = [*documents, *[documents[0][:0]] * (self._bank.rows - len(documents))]
        windows = min(self._kept(row, tokens, stride) for row, tokens in enumerate(documents) if len(tokens))
        for row in range(self._bank.rows):
            self._bank.row(row).truncate(_end(windows, self._window, stride))
        for embedded in self._embedded.values():
            del embedded[windows:]
        self._subject.progress.advance(sum(min(len(d), _end(windows, self._window, stride)) for d in documents))
        self._held = list(documents)
        self._go_on(windows * stride)
        return self._banks()

    def _kept(self, row: int, tokens: np.ndarray, stride: int) -> int:
        """How many windows of a row are also those of its next document."""
        held = self._held[row]
        both = min(len(held), len(tokens))
        differ = np.flatnonzero(held[:both] != tokens[:both])
        common = int(differ[0]) if len(differ) else both
        return max(0, (common - self._window) // stride + 1)

    def _go_on(self, begin: int) -> None:
        first, subject = self._retrievals[0], self._subject

        def embed(batch: dict[str, Any], hidden: Tensor | None) -> Tensor:
            for name, retrieval in self._encoders.items():
                self._embedded[name].append(retrieval.embed(batch, hidden=hidden))
            return self._embedded[id(first.retriever)][-1]

        spans = [Span(tokens) for tokens in self._held]
        reading = read_windows(
            subject.model, first, self._bank, spans, self._window, subject.autocast, embed=embed, begin=begin
        )
        self.tokens = 0
        for count in reading:
            self.tokens += count
            subject.progress.advance(count)

    def _banks(self) -> list[BankView]:
        first = id(self._retrievals[0].retriever)
        found: dict[int, BankView] = {}
        again = (self._window - reading_stride(self._window, self._chunk)) // self._chunk
        for name, embedded in self._embedded.items():
            if name == first:
                found[name] = self._bank
                continue
            chunks = cat([e[:, again if number else 0 :] for number, e in enumerate(embedded)], dim=1)
            rows = range(self._bank.rows)
            found[name] = self._bank.with_embeddings([chunks[row, : len(self._bank.entries(row))] for row in rows])
        return [found[id(r.retriever)] for r in self._retrievals]


def _end(windows: int, window: int, stride: int) -> int:
    """Where the last of so many windows ends [tokens]."""
    return window + (windows - 1) * stride if windows else 0
