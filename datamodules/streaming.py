"""Batches from text that is read and tokenised as training goes, with an exact position at every batch.

Documents are put in order, shuffled in blocks and dealt to ranks in the main process, where all state lives; worker
processes only turn a text into tokens. So neither their number nor how far they are ahead changes the order.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_memlong.distributed import any_rank, rank_and_world
from lightning_memlong.errors import UserError
from lightning_memlong.text import Batch, Windows, WindowSpec, tokenise

from .records import Document
from .shuffle import EpochPosition, Sample, SplitDocuments, draw_samples
from .tokenise_ahead import tokenise_ahead

ROW_BITS = 40
KEPT_POSITIONS = 16  # Lightning looks one batch ahead; the position of the last finished one must still be known


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
        source: What to read.
        tokenizer: Turns text into tokens.
        windows: How documents are cut and batched.
        seed: Shuffle with this seed; None keeps the order of the source.
        buffer: Documents that are shuffled together.
        workers: Worker processes that tokenise ahead; 0 does it in this process, when a row needs it.
        shortest: Documents with fewer tokens are left out, and counted.
        longest: Documents are read up to here; None: whole.
        is_bad: Whether a document of so many tokens is to be counted and left out; or raises for one.
        control: Whether what is spelled like a special token becomes one.
    """

    def __init__(
        self,
        source: SplitDocuments,
        tokenizer: PreTrainedTokenizerBase,
        windows: Windows,
        seed: int | None,
        buffer: int,
        workers: int,
        shortest: int,
        longest: int | None,
        is_bad: Callable[[Document, int], bool],
        control: bool = False,
    ) -> None:
        self.source, self.tokenizer, self.windows, self.seed = source, tokenizer, windows, seed
        self.buffer, self.workers, self.shortest, self.longest = buffer, workers, shortest, longest
        self.is_bad, self.control = is_bad, control
        self.epoch = 0
        self._begun = False
        self._resume: dict[str, Any] | None = None
        self._positions: dict[int, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] | None = None
        self._names: dict[int, str] = {}

    def digest(self) -> str:
        """What the order of batches depends on beside the settings."""
        return self.source.digest

    def longest_document(self) -> int | None:
        """Its length [tokens]; None: not known."""
        return self.longest

    def name_of(self, document: int) -> str:
        """The name of a ``document_id``: its file, and the row at which it begins if the file has rows."""
        shard, row = document >> ROW_BITS, document & ((1 << ROW_BITS) - 1)
        return self._names.get(document) or f"{self.source.shards[shard]}:{row + 1}"

    def left_out(self) -> str:
        """What was dropped in an epoch (the last that was finished, if one was), in words."""
        c = self._finished or self._counts
        parts = [f"{c['short']} shorter than {self.shortest} tokens"] if c["short"] else []
        parts += [f"{c['bad']} that could not be used"] if c["bad"] else []
        parts += [words] if self.source.held_out and (words := self.source.held_out.words()) else []
        return f"{c['read']} documents read; left out: {', '.join(parts)}" if parts else ""

    def was_read(self) -> str:
        """How much was read in an epoch (the last that was finished, if one was), in words."""
        c = self._finished or self._counts
        used = c["read"] - c["short"] - c["bad"]
        return f"{used:,} documents of {c['tokens']:,} tokens in {'an epoch' if self._finished else 'this run'}"

    def whole_documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tokens of each document, in order."""
        for sample, tokens in self._samples(EpochPosition()):
            if (reading := self._open_document(sample.document, tokens)) is not None:
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

    def replay_windows(self, position: dict[str, Any]) -> list[list[np.ndarray]]:
        """Of each row, the windows that were read of the document it is in the middle of at a position."""
        w = self.windows
        rows = self._reopen_rows(position.get("rows") or [None] * w.rows)
        return [[] if row is None else [row.tokens[at : at + w.window] for at in range(0, row.offset, w.stride)]
                for row in rows]  # fmt: skip

    def _save_position(self, batch: int, after: EpochPosition | None, rows: list[_Reading | None]) -> None:
        self._positions[batch] = {
            "after": None if after is None else [after.block, list(after.begin), after.taken, after.drawn],
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
        number, after, rows = self._start_epoch()
        samples = self._samples(after or EpochPosition())
        while True:
            after = self._fill_rows(rows, samples) or after
            if not any_rank(any(row is not None for row in rows)):
                break
            specs = [None if row is None else self._window_spec(row) for row in rows]
            rows = [self._advance_row(row) for row in rows]
            number += 1
            self._save_position(number, after, rows)
            yield self.windows.batch(specs)
        self._finished = self._counts
        if number == 0:
            raise UserError(
                f"data: no document of {self.source.name} can be read ({self.left_out() or 'there is none'}). Allowed: "
                "at least one that is long enough. Fix: lower --data.min_document_tokens, add text, or, where a hash "
                "divides few documents, raise --data.validation_fraction or set --data.cache true."
            )

    def _start_epoch(self) -> tuple[int, EpochPosition | None, list[_Reading | None]]:
        """Where an epoch begins: the number of its next batch, the place in it, and what rows are in the middle of."""
        saved, self._resume, self._begun = self._resume, None, True
        self._counts = Counter(saved["counts"] if saved else {})
        if saved is None:
            self._positions = {}
            return 0, None, [None] * self.windows.rows
        number = saved["batch"]
        self._positions = {number: self._positions[number]}
        after = None
        if saved["after"]:
            block, (shard, row), taken, drawn = saved["after"]
            after = EpochPosition(block, (shard, row), taken, drawn)
        return number, after, self._reopen_rows(saved["rows"])

    def _samples(self, start: EpochPosition) -> Iterator[tuple[Sample, np.ndarray]]:
        """This process's documents with their tokens, in order, whatever the number of workers."""
        rank, world = rank_and_world()
        drawn = draw_samples(self.source, self.epoch, self.seed, self.buffer, start)
        mine = (sample for sample in drawn if (sample.after.drawn - 1) % world == rank)
        return tokenise_ahead(mine, self.tokenizer, self.workers, self.control)

    def _fill_rows(
        self, rows: list[_Reading | None], samples: Iterator[tuple[Sample, np.ndarray]]
    ) -> EpochPosition | None:
        """Give every row without a document the next one; the place after the last that was taken, if any was."""
        after: EpochPosition | None = None
        for i, row in enumerate(rows):
            while row is None and (found := next(samples, None)) is not None:
                sample, tokens = found
                after = sample.after
                row = rows[i] = self._open_document(sample.document, tokens)
        return after

    def _open_document(self, document: Document, tokens: np.ndarray) -> _Reading | None:
        self._counts["read"] += 1
        if self.is_bad(document, len(tokens)):
            self._counts["bad"] += 1
            return None
        if len(tokens) < self.shortest:
            self._counts["short"] += 1
            return None
        self._counts["tokens"] += len(tokens[: self.longest])
        return _Reading(document, tokens[: self.longest], 0)

    def _reopen_rows(self, rows: list[list[int] | None]) -> list[_Reading | None]:
        """Read again what the rows were in the middle of."""
        reopened: list[_Reading | None] = []
        for row in rows:
            if row is None:
                reopened.append(None)
                continue
            document = next(self.source.read(row[0], row[1]), None)
            text = "" if document is None else document.text
            tokens = tokenise(self.tokenizer, [text], self.control)[0][: self.longest]
            if document is None or len(tokens) == 0 or row[2] not in self.windows.offsets(len(tokens)):
                raise UserError(
                    f"data: {self.source.shards[row[0]]}:{row[1] + 1} has {len(tokens)} tokens, and the checkpoint is "
                    f"at {row[2]} of it. Allowed: the text that the checkpoint was made with. Fix: give it as it was, "
                    "or start a new run without --ckpt_path."
                )
            reopened.append(_Reading(document, tokens, row[2]))
        return reopened

    def _window_spec(self, row: _Reading) -> WindowSpec:
        shard, first = row.document.place
        number = shard << ROW_BITS | first
        if self.name_of(number) != row.document.id:  # of files with rows it is known without
            self._names[number] = row.document.id
        return WindowSpec(number, row.offset, row.tokens[row.offset : row.offset + self.windows.window])

    def _advance_row(self, row: _Reading | None) -> _Reading | None:
        """The row's next window, or None if this was its document's last."""
        if row is None or row.offset == self.windows.offsets(len(row.tokens))[-1]:
            return None
        return replace(row, offset=row.offset + self.windows.stride)
