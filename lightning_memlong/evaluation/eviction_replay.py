"""A document that lies in a bank, read once more into a smaller one that forgets.

What is stored of a chunk does not depend on what is kept, so a replay stores no keys and values of its own: the small
bank is a real one, with its search, counters and eviction, whose chunks are one number wide. Whoever attends to what it
found gets keys and values from the bank that has everything.

Legend: W tokens of a window, C tokens of a chunk, n chunks of a window, T tokens of a document, E embedding size.
"""

from collections.abc import Iterator

import numpy as np
import torch

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.generation import sink_before
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.text import Batch, Windows, WindowSpec, to_device

AS_NUMBERS = {"storage": "device", "storage_folder": None, "dtype": "float32"}
"""Fields of the memory group with which the small bank is made: there is nothing in it to be moved or packed."""


def embedded(subject: Subject, retrieval: Retrieval, tokens: np.ndarray, document: int) -> BankView:
    """All chunks of a document, as the encoder alone knows them, in a bank that evicts nothing; no model reads it.

    Args:
        subject: Who has the tokenizer.
        retrieval: Settings with :data:`AS_NUMBERS`.
        tokens: (T,) of the document.
        document: Its number.
    """
    bank = retrieval.new_bank(1, len(tokens))
    windows = Windows(subject.data.window, subject.data.window, 1, subject.tokenizer.pad_token_id or 0)
    for offset in windows.offsets(len(tokens)):
        batch = windows.batch([WindowSpec(document, offset, tokens[offset : offset + windows.window])])
        retrieval.store(bank, _numbers(windows.window), to_device(batch, subject.device))
        subject.progress.advance(int(batch["length"]))
    return bank


def _numbers(window: int) -> dict[str, torch.Tensor]:
    nothing = torch.zeros(1, 1, window, 1)
    return {"keys": nothing, "values": nothing}


def from_everything(everything: BankView, found: Retrieved | None) -> Retrieved | None:
    """A record of a small bank, with keys and values of the bank of one row that has everything."""
    if found is None or found.empty:
        return None
    places = torch.where(found.positions >= 0, found.positions // everything.chunk_size, -1)
    record = everything.gather(places, found.scores, count=False)
    assert record is not None
    record.entries, record.count_attention = found.entries, found.count_attention
    record.begin, record.length, record.top_k = found.begin, found.length, found.top_k
    return record


class Replay:
    """Reads one document, window by window: retrieve, look at what was found, store; as training and reading do.

    Args:
        subject: Whose model; it is only asked where use is counted by attention.
        retrieval: The settings of the small bank, with :data:`AS_NUMBERS`.
        everything: The document, read without memory into a bank that evicts nothing.
        tokens: (T,) of the document.
        document: Its number; random draws depend on it.
    """

    def __init__(
        self, subject: Subject, retrieval: Retrieval, everything: BankView, tokens: np.ndarray, document: int
    ) -> None:
        self._subject, self.retrieval, self._everything = subject, retrieval, everything
        self._tokens, self._document = tokens, document
        self._windows = Windows(subject.data.window, subject.data.stride, 1, subject.tokenizer.pad_token_id or 0)
        self.bank = retrieval.new_bank(1)
        self.evictions = self.used = 0
        """Entries dropped so far, and how many of them had ever been used."""

    def batches(self) -> Iterator[Batch]:
        """The windows of the document, in their order."""
        for offset in self._windows.offsets(len(self._tokens)):
            spec = WindowSpec(self._document, offset, self._tokens[offset : offset + self._windows.window])
            yield to_device(self._windows.batch([spec]), self._subject.device)

    def retrieve(self, batch: Batch) -> Retrieved | None:
        """What a window finds, counted as it is; None: nothing yet."""
        return from_everything(self._everything, self.retrieval.retrieve(self.bank, batch))

    @torch.no_grad()
    def store(self, batch: Batch, memory: Retrieved | None) -> None:
        """Count what the window attended to, if that is asked for, and store its chunks; a full bank evicts.

        Args:
            batch: The window.
            memory: What :meth:`retrieve` gave for it.
        """
        if memory is not None and memory.count_attention:
            window, chunk, model = self._windows.window, self.bank.chunk_size, self._subject.model
            sink = sink_before(model, self._subject.tokenizer, int(batch["offset"]), window, chunk)
            with self._subject.autocast():
                found = model.capture(batch["input_ids"], memory, sink)
            self.retrieval.count_use(self.bank, memory, found.get("chunk_use"))
        self.retrieval.store(self.bank, _numbers(self._windows.window), batch, self._embeddings(batch))
        for dropped in self.bank.evicted:
            self.evictions += len(dropped)
            self.used += int((dropped.counters > 0).sum())

    def _embeddings(self, batch: Batch) -> torch.Tensor:
        """(1, n, E) of the window's chunks, as the bank that has everything knows them; zeros beyond the text."""
        chunk = self.bank.chunk_size
        first, count = int(batch["offset"]) // chunk, self._windows.window // chunk
        known = self._everything.entries(0).embeddings[first : first + count]
        return torch.nn.functional.pad(known, (0, 0, 0, count - len(known)))[None]

    def holds(self, span: tuple[int, int]) -> bool:
        """Whether a chunk with some of the tokens from one place to another is still there."""
        held = self.bank.entries(0)
        return bool(((held.positions < span[1]) & (held.positions + held.lengths > span[0])).any())
