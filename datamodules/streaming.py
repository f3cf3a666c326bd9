"""Batches from text that is read and tokenised as training goes, with an exact position at every batch.

Documents are put in order, shuffled in blocks and dealt to ranks in the main process, where all state lives; worker
processes only turn a text into tokens. So neither their number nor how far they are ahead changes the order.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from datamodules.shuffle import Corpus, Drawn, order
from datamodules.token_cache import Document
from lightning_memlong.distributed import any_rank, rank_and_world
from lightning_memlong.errors import UserError
from lightning_memlong.text.tokenise import tokenise
from lightning_memlong.text.windows import Batch, Windows, WindowSpec

ROW_BITS = 40
KEPT_POSITIONS = 16  # Lightning looks one batch ahead; the position of the last finished one must still be known


class _Tokenised(Dataset[Any]):
    """Turns what the sampler hands over into tokens: in a worker process, or in this one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __getitem__(self, drawn: Drawn) -> tuple[Drawn, np.ndarray]:
        tokens = tokenise(self.tokenizer, [drawn.document.text])[0]
        return replace(drawn, document=replace(drawn.document, text="")), tokens


def _as_is(item: Any) -> Any:
    return item


def _single_threaded(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork


@dataclass
class _Reading:
    """What a row is in the middle of."""

    document: Document
    tokens: np.ndarray
    offset: int


class LiveStream:
    """Batches of one split, tokenised ahead of the model; each iteration is the next epoch.

    A row that has finished its document takes the next one of the epoch's order. With several processes, document n
    of the order goes to process n modulo their number, and an epoch ends in all of them when the last one has
    finished: until then the others see rows of padding.

    Args:
        corpus: What to read.
        tokenizer: Turns text into tokens.
        windows: How documents are cut and batched.
        seed: Shuffle with this seed; None keeps the order of the source.
        buffer: Documents that are shuffled together.
        workers: Worker processes that tokenise ahead; 0 does it in this process, when a row needs it.
        shortest: Documents with fewer tokens are left out, and counted.
        longest: Documents are read up to here; None: whole.
        judge: Raises for a document that cannot be used, or returns that it is to be counted and left out.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        windows: Windows,
        seed: int | None,
        buffer: int,
        workers: int,
        shortest: int,
        longest: int | None,
        judge: Callable[[Document, int], bool],
    ) -> None:
        self.corpus, self.tokenizer, self.windows, self.seed = corpus, tokenizer, windows, seed
        self.buffer, self.workers, self.shortest, self.longest = buffer, workers, shortest, longest
        self.judge = judge
        self.epoch = 0
        self._begun = False
        self._resume: dict[str, Any] | None = None
        self._positions: dict[int, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] | None = None
        self._names: dict[int, str] = {}

    def digest(self) -> str:
        """What the order of batches depends on beside the settings."""
        return self.corpus.digest

    def longest_document(self) -> int | None:
        """Its length [tokens]; None: not known."""
        return self.longest

    def name_of(self, document: int) -> str:
        """The name of a ``document_id``: its file, and the row at which it begins if the file has rows."""
        shard, row = document >> ROW_BITS, document & ((1 << ROW_BITS) - 1)
        return self._names.get(document) or f"{self.corpus.shards[shard]}:{row + 1}"

    def left_out(self) -> str:
        """What was dropped in an epoch (the last that was finished, if one was), in words."""
        c = self._finished or self._counts
        parts = [f"{c['short']} shorter than {self.shortest} tokens"] if c["short"] else []
        parts += [f"{c['bad']} that could not be used"] if c["bad"] else []
        return f"{c['read']} documents read; left out: {', '.join(parts)}" if parts else ""

    def whole_documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tokens of each document, in order."""
        for drawn, tokens in self._documents((0, (0, 0), 0, 0)):
            if (reading := self._accept(drawn.document, tokens)) is not None:
                yield reading.document.id, reading.tokens

    # ---- positions ----------------------------------------------------------------------------------------

    def position(self, epoch: int, batch: int) -> dict[str, Any]:
        """All there is to know of a place in the data, as plain values.

        Args:
            epoch: Which epoch; past the present one, its beginning.
            batch: The first batch that has not been used.
        """
        if batch == 0 or epoch != self.epoch:
            return {"epoch": epoch, "batch": 0}
        return {"epoch": epoch, "batch": batch, **self._positions[batch]}

    def resume(self, position: dict[str, Any]) -> None:
        """Begin the next iteration there."""
        self.epoch, self._begun = position["epoch"], False
        self._resume = position if position["batch"] else None
        # Saving again before the first step must work too.
        self._positions = {position["batch"]: {k: position[k] for k in ("after", "rows", "counts") if k in position}}

    def begun(self, position: dict[str, Any]) -> list[list[np.ndarray]]:
        """Of each row, the windows that were read of the document it is in the middle of at a position."""
        w = self.windows
        rows = self._reopen(position.get("rows") or [None] * w.rows)
        return [[] if row is None else [row.tokens[at : at + w.window] for at in range(0, row.offset, w.stride)]
                for row in rows]  # fmt: skip

    def _remember(self, batch: int, last: Drawn | None, rows: list["_Reading | None"]) -> None:
        after = None if last is None else [last.block, list(last.begin), last.taken, last.count]
        self._positions[batch] = {
            "after": after,
            "rows": [None if r is None else [*r.document.place, r.offset] for r in rows],
            "counts": dict(self._counts),
        }
        self._positions.pop(batch - KEPT_POSITIONS, None)

    # ---- batches ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch, from a resumed position on if there is one.

        Raises:
            UserError: If no document is long enough, or one cannot be used.
        """
        self.epoch += self._begun
        saved, self._resume, self._begun = self._resume, None, True
        number = saved["batch"] if saved else 0
        after = saved["after"] if saved else None
        self._counts = Counter(saved["counts"] if saved else {})
        self._positions = {number: self._positions[number]} if saved else {}
        rows: list[_Reading | None] = self._reopen(saved["rows"]) if saved else [None] * self.windows.rows
        start = (after[0], (after[1][0], after[1][1]), after[2], after[3]) if after else (0, (0, 0), 0, 0)
        last = Drawn(Document("", ""), *start) if after else None
        documents = self._documents(start)
        while True:
            last = self._fill(rows, documents) or last
            if not any_rank(any(row is not None for row in rows)):
                break
            places = [None if row is None else self._place(row) for row in rows]
            rows = [self._advance(row) for row in rows]
            number += 1
            self._remember(number, last, rows)
            yield self.windows.batch(places)
        self._finished = self._counts
        if number == 0:
            raise UserError(
                f"data: no document of {self.corpus.name} can be read ({self.left_out() or 'there is none'}). Allowed: "
                "at least one that is long enough. Fix: lower --data.min_document_tokens, add text, or, where a hash "
                "divides few documents, raise --data.validation_fraction or set --data.cache true."
            )

    def _documents(self, start: tuple[int, tuple[int, int], int, int]) -> Iterator[tuple[Drawn, np.ndarray]]:
        """This process's documents with their tokens, in order, whatever the number of workers."""
        rank, world = rank_and_world()
        drawn = order(self.corpus, self.epoch, self.seed, self.buffer, start)
        mine = (d for d in drawn if (d.count - 1) % world == rank)
        loader: Any = DataLoader(
            _Tokenised(self.tokenizer),
            sampler=mine,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_is,
            worker_init_fn=_single_threaded,
            # Of its own: making an iterator must not draw from the random state that a resume restores.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _fill(self, rows: list["_Reading | None"], documents: Iterator[tuple[Drawn, np.ndarray]]) -> Drawn | None:
        """Give every row without a document the next one; the last that was taken, if any was."""
        last: Drawn | None = None
        for i, row in enumerate(rows):
            while row is None and (found := next(documents, None)) is not None:
                last, tokens = found
                row = rows[i] = self._accept(last.document, tokens)
        return last

    def _accept(self, document: Document, tokens: np.ndarray) -> "_Reading | None":
        self._counts["read"] += 1
        if self.judge(document, len(tokens)):
            self._counts["bad"] += 1
            return None
        if len(tokens) < self.shortest:
            self._counts["short"] += 1
            return None
        return _Reading(document, tokens[: self.longest], 0)

    def _reopen(self, rows: list[list[int] | None]) -> list["_Reading | None"]:
        """Read again what the rows were in the middle of."""
        reopened: list[_Reading | None] = []
        for row in rows:
            if row is None:
                reopened.append(None)
                continue
            document = next(self.corpus.read(row[0], row[1]))
            tokens = tokenise(self.tokenizer, [document.text])[0][: self.longest]
            reopened.append(_Reading(document, tokens, row[2]))
        return reopened

    def _place(self, row: _Reading) -> WindowSpec:
        shard, first = row.document.place
        number = shard << ROW_BITS | first
        self._names[number] = row.document.id
        return WindowSpec(number, row.offset, row.tokens[row.offset : row.offset + self.windows.window])

    def _advance(self, row: "_Reading | None") -> "_Reading | None":
        """The row's next window, or None if this was its document's last."""
        if row is None or row.offset == self.windows.offsets(len(row.tokens))[-1]:
            return None
        return replace(row, offset=row.offset + self.windows.stride)
