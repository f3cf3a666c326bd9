"""Document streams: every batch row reads one document from start to end, window by window.

A batch is ``{"input_ids": (B, T), "labels": (B, T), "length": (B,), "document_start": (B,), "document_id": (B,),
"offset": (B,), "fresh": (B,)}``. Row b continues row b of the batch before it until its document ends; a window
never holds two documents; the short last window of a document is padded on the right and masked.
"""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from datamodules.token_cache import Document, TokenCache
from lightning_memlong.backbones import load_tokenizer
from lightning_memlong.config import require
from lightning_memlong.errors import UserError

Batch = dict[str, Tensor]


def window_offsets(length: int, window: int, stride: int) -> list[int]:
    """Where the windows of a document of ``length`` tokens begin.

    The first window is scored whole, each later one on its last ``stride`` tokens, so that every token is
    scored once and, past the first window, sees at least ``window - stride`` tokens before it.
    """
    extra = max(0, length - window)
    return [i * stride for i in range(1 + -(-extra // stride))]


def plan_rows(
    lengths: Sequence[int], documents: Sequence[int], batch_size: int, window: int, stride: int
) -> list[list[int]]:
    """Which documents each row reads: the longest first, each to the row with least to read, so rows end together."""
    rows: list[list[int]] = [[] for _ in range(batch_size)]
    load = [(0, row) for row in range(batch_size)]
    for place in sorted(range(len(documents)), key=lambda i: -lengths[documents[i]]):
        steps, row = heapq.heappop(load)
        rows[row].append(place)
        heapq.heappush(load, (steps + len(window_offsets(lengths[documents[place]], window, stride)), row))
    return [[documents[place] for place in sorted(row)] for row in rows]


class DocumentStream(IterableDataset[Batch]):
    """Batches of one split, in one order, from any batch on.

    The order is a function of the documents' lengths, the seed and the epoch, so the whole position in the data
    is the pair (epoch, batch), and beginning at any batch costs nothing.

    Args:
        cache: Tokens of all documents.
        documents: Which of them to read, in this order (before shuffling).
        window: Tokens a step sees.
        stride: Tokens a step advances.
        batch_size: Rows.
        pad: Token id for padding.
        seed: Shuffle documents with this seed; None keeps their order.
    """

    def __init__(
        self,
        cache: TokenCache,
        documents: Sequence[int],
        window: int,
        stride: int,
        batch_size: int,
        pad: int = 0,
        seed: int | None = None,
    ) -> None:
        self.cache, self.documents, self.window, self.stride = cache, list(documents), window, stride
        self.batch_size, self.pad, self.seed = batch_size, pad, seed
        self.epoch = 0
        self.first_batch = 0
        self._begun = False
        self._rows = plan_rows(cache.lengths, self.documents, batch_size, window, stride)

    def digest(self) -> str:
        """What the order of batches depends on beside the settings: which text, cut where."""
        lengths = [self.cache.lengths[i] for i in self.documents]
        return hashlib.sha256(repr((self.cache.name, self.documents, lengths)).encode()).hexdigest()[:16]

    def _steps(self) -> list[list[tuple[int, int]]]:
        """Of each row, (document, offset) of every window of this epoch."""
        rows = self._rows
        if self.seed is not None:
            # Mixed within rows: so every epoch has the same number of batches, which Lightning relies on.
            mixer = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            rows = [[row[i] for i in torch.randperm(len(row), generator=mixer)] for row in rows]
        return [[(document, at) for document in row for at in self._offsets(document)] for row in rows]

    def __len__(self) -> int:
        """Batches in an epoch; the same in every one."""
        return max(sum(len(self._offsets(document)) for document in row) for row in self._rows)

    def _offsets(self, document: int) -> list[int]:
        return window_offsets(self.cache.lengths[document], self.window, self.stride)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from ``first_batch`` on; each further iteration is the next epoch, from its beginning."""
        # A generator's body runs at the first next(), so an iterator that is made and thrown away changes nothing.
        self.epoch += self._begun
        start, self.first_batch, self._begun = self.first_batch, 0, True
        steps = self._steps()
        for i in range(start, len(self)):
            yield self._batch([row[i] if i < len(row) else None for row in steps])

    def _batch(self, places: Sequence[tuple[int, int] | None]) -> Batch:
        rows = [self._row(place) for place in places]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, place: tuple[int, int] | None) -> Batch:
        ids = torch.full((self.window,), self.pad, dtype=torch.long)
        labels = torch.full((self.window,), -100, dtype=torch.long)
        document, offset = place or (-1, 0)  # a row that has run out of documents is all padding
        tokens = self.cache.tokens(document, offset, offset + self.window) if place else ids[:0].numpy()
        length = len(tokens)
        fresh = 0 if offset == 0 else self.window - self.stride
        ids[:length] = torch.from_numpy(tokens.astype("int64"))
        labels[fresh:length] = ids[fresh:length]
        labels[0] = -100  # nothing in the window to predict it from
        facts = {"length": length, "document_start": place is not None and offset == 0}
        facts |= {"document_id": document, "offset": offset, "fresh": fresh}
        return {"input_ids": ids, "labels": labels} | {k: torch.tensor(v) for k, v in facts.items()}


class DocumentDataModule(L.LightningDataModule):
    """What every corpus shares: windows, splits, tokens, batches and exact resume.

    A corpus says what its documents are by overriding :meth:`read_documents` and :meth:`split`.

    Args:
        tokenizer: Backbone whose tokenizer is used (set by ``model.backbone``).
        chunk_size: Tokens of a bank entry (set by ``memory.chunk_size``).
        window: Tokens a step sees [tokens]. Paper, section 3: 1,024.
        stride: Tokens a step advances and is scored on [tokens]; null: the window (disjoint windows, the paper).
        batch_size: Documents read side by side [rows].
        min_document_tokens: Shorter documents are left out, and counted [tokens]; null: one window.
        max_document_tokens: Longer documents are read up to here [tokens]; null: whole.
        shuffle: Mix the order of training documents anew each epoch.
        seed: Seed of that order (set by ``seed_everything``).
    """

    name = "documents"

    def __init__(
        self,
        tokenizer: str = "smollm2-135m",
        chunk_size: int = 128,
        window: int = 512,
        stride: int | None = None,
        batch_size: int = 1,
        min_document_tokens: int | None = None,
        max_document_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.stride = window if stride is None else stride
        fits = f"a multiple of memory.chunk_size={chunk_size}"
        require(window >= 1 and window % chunk_size == 0, "data.window", window, fits, "change one of the two")
        require(
            0 < self.stride <= window and self.stride % chunk_size == 0,
            "data.stride",
            stride,
            f"{fits}, at most data.window={window}",
            "leave it out for disjoint windows",
        )
        require(batch_size >= 1, "data.batch_size", batch_size, "1 or more", "raise it")
        self.tokenizer_name, self.chunk_size, self.window, self.batch_size = tokenizer, chunk_size, window, batch_size
        self.min_document_tokens = window if min_document_tokens is None else min_document_tokens
        require(
            max_document_tokens is None or max_document_tokens >= self.min_document_tokens,
            "data.max_document_tokens",
            max_document_tokens,
            f"null, or at least data.min_document_tokens={self.min_document_tokens}",
            "raise it, or lower --data.min_document_tokens",
        )
        self.max_document_tokens = max_document_tokens
        self.shuffle, self.seed = shuffle, seed
        self._streams: dict[str, DocumentStream] = {}
        self._resume: tuple[int, int] | None = None

    def read_documents(self) -> list[Document]:
        """All documents of the corpus, in a stable order."""
        raise NotImplementedError

    def split(self, documents: Sequence[str], stage: str) -> dict[str, list[int]]:
        """Which documents (by place in ``documents``) belong to train, validation and test."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read, tokenise and split the corpus once.

        Raises:
            UserError: If a split that the stage needs is empty.
        """
        if self._streams:
            return
        tokenizer = load_tokenizer(self.tokenizer_name)
        cache = TokenCache.build(self.read_documents(), tokenizer, self.name)
        if self.max_document_tokens:
            cache.lengths = [min(n, self.max_document_tokens) for n in cache.lengths]
        long_enough = [i for i, n in enumerate(cache.lengths) if n >= max(2, self.min_document_tokens)]
        if not long_enough:
            raise UserError(
                f"data.min_document_tokens={self.min_document_tokens}: the longest of {len(cache)} documents has "
                f"{max(cache.lengths, default=0)} tokens. Allowed: at most that. Fix: lower it, or add longer text."
            )
        self.left_out = len(cache) - len(long_enough)
        parts = self.split([cache.ids[i] for i in long_enough], stage)
        self.document_ids = cache.ids
        for part, members in parts.items():
            chosen = [long_enough[i] for i in members]
            seed = self.seed if part == "train" and self.shuffle else None
            pad = tokenizer.pad_token_id or 0
            self._streams[part] = DocumentStream(cache, chosen, self.window, self.stride, self.batch_size, pad, seed)
        self._tell(parts, cache)

    def _tell(self, parts: dict[str, list[int]], cache: TokenCache) -> None:
        counts = ", ".join(f"{part} {len(members)}" for part, members in parts.items())
        short = f"; {self.left_out} shorter than {self.min_document_tokens} tokens left out" if self.left_out else ""
        print(f"Data: {self.name}, {sum(cache.lengths):,} tokens; documents: {counts}{short}", flush=True)

    def _loader(self, part: str) -> DataLoader[Batch]:
        # A generator of its own: making an iterator must not draw from the random state that a resume restores.
        return DataLoader(self._streams[part], batch_size=None, num_workers=0, generator=torch.Generator())

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the first epoch; after a resume, from the first batch that was not trained on."""
        stream = self._streams["train"]
        if self._resume is not None:
            stream.epoch, stream.first_batch = self._resume
            self._resume = None
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, always in the same order."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches, always in the same order."""
        return self._loader("test")

    def _facts(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("window", "stride", "batch_size", "seed", "shuffle")}

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data: the epoch, and the first of its batches that was not trained on.

        Epochs are the stream's own: Lightning's count is one ahead after resuming at the last batch of an epoch.
        """
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        epoch = self._streams["train"].epoch
        finished = progress.is_last_batch and progress.current.processed == progress.current.ready
        place = (epoch + 1, 0) if finished else (epoch, progress.current.processed)
        return {"epoch": place[0], "batch": place[1], "text": self._streams["train"].digest(), **self._facts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position when training goes on; an evaluation begins at the beginning.

        Raises:
            UserError: If the order of batches would not be the one of the saved run.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        if state["text"] != self._streams["train"].digest():
            raise UserError(
                "data: the training text is not the one of the checkpoint (data.path, split, validation_fraction, "
                "extensions, min_document_tokens and max_document_tokens make it). Allowed: the same text. Fix: give "
                "these options as they were, or start a new run without --ckpt_path."
            )
        for key, value in self._facts().items():
            fix = "go on with that value, or start a new run"
            require(state[key] == value, f"data.{key}", value, f"{state[key]}, which the checkpoint was made with", fix)
        self._resume = (state["epoch"], state["batch"])
