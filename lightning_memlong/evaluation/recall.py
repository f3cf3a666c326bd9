"""Recall probes: something planted at a depth of a long document is asked for at its end."""

import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.reading import Scoring, read, score, window_batch
from lightning_memlong.evaluation.recall_report import report
from lightning_memlong.evaluation.record import Record, Row
from lightning_memlong.generation import reading_stride, sink_before
from lightning_memlong.retrieval import Retrieval, embed_texts, retrieve_for
from lightning_memlong.text import window_offsets
from lightning_memlong.text.planting import KINDS, Probe, filler_tokens, plant


class Cell(NamedTuple):
    """One probe."""

    kind: str
    length: int
    depth: float
    sample: int


class RecallProbes(Evaluation):
    """Accuracy of answers, and whether what was planted is retrieved, over depth and length.

    The last ``data.window`` tokens of a document are local, the rest is memory. The question retrieves by its own text.
    An answer is right if each of its tokens is the most likely one, which is what greedy decoding would write. The
    filler is the same in all documents and is read once; of each probe only the windows that differ are read.

    Args:
        kinds: pass_key: a number; key_value: one of several pairs; passage: words planted twice, the second half of the
            second time is the answer.
        lengths: Tokens of the documents [tokens].
        depths: Where it is planted, from 0 (the beginning) to 1 (right before the question).
        samples: Documents of each kind, length and depth [documents].
        filler: Text file everything is planted in; null: the sentences of the pass-key task.
        selections: How chunks are chosen: similarity, and the controls recent and random.
    """

    name = "recall"
    keys = ("kind", "length", "depth", "sample", "setting")

    def __init__(
        self,
        kinds: list[str] = list(KINDS),  # noqa: B006  (shown as the default by --help)
        lengths: list[int] = [1024, 4096, 16384, 65536],  # noqa: B006  (likewise)
        depths: list[float] = [0.0, 0.25, 0.5, 0.75, 1.0],  # noqa: B006  (likewise)
        samples: int = 3,
        filler: str | None = None,
        selections: list[str] = ["similarity", "random"],  # noqa: B006  (likewise)
    ) -> None:
        for kind in kinds:
            require_choice("evaluation.kinds", kind, KINDS)
        for selection in selections:
            require_choice("evaluation.selections", selection, ("similarity", "recent", "random"))
        require(samples >= 1, "evaluation.samples", samples, "1 or more", "raise it")
        ok = bool(depths) and all(0 <= d <= 1 for d in depths)
        require(ok, "evaluation.depths", depths, "from 0 to 1", "correct them")
        require(bool(lengths), "evaluation.lengths", lengths, "at least one", "name one")
        self.kinds, self.lengths, self.depths, self.samples = kinds, sorted(lengths), depths, samples
        self.filler, self.selections = filler, selections

    # ---- before anything is measured ----------------------------------------------------------------------

    def prepare(self, subject: Subject) -> None:
        """Make the documents."""
        window, chunk = subject.data.window, subject.memory.chunk_size
        ok = all(length % chunk == 0 and length >= window for length in self.lengths)
        allowed = f"multiples of memory.chunk_size={chunk}, at least data.window={window}"
        require(ok, "evaluation.lengths", self.lengths, allowed, "change them, or --data.window")
        # One set of chunks for the answer; each probe changes embeddings, which an index that is trained cannot follow.
        fixed = {"index": "Flat", "granularity": "window", "query": "previous"}
        self._ways = {s: subject.retrieval({**fixed, "selection": s}) for s in self.selections}
        self._filler = filler_tokens(self.filler, max(self.lengths), subject.tokenizer, "evaluation.filler")
        grid = itertools.product(self.kinds, self.lengths, self.depths, range(self.samples))
        self._cells = [Cell(*values) for values in grid]
        self._probes = {c: plant(*c, self._filler, subject.tokenizer, "evaluation.lengths") for c in self._cells}
        longest = max(len(p.tokens) - p.question for p in self._probes.values())
        allowed = f"more than the {longest} tokens of the longest question and answer"
        require(window > longest, "data.window", window, allowed, "raise it")
        self.title = f"{subject.backbone}, window {window}, top-k {subject.memory.top_k}"

    def planned(self) -> list[Row]:
        """All probes, each with memory off and each way of choosing."""
        return [_key(cell, name) for cell in self._cells for name in ("off", *self._ways)]

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Row]:
        """One probe after the other, with memory off and with each way of choosing."""
        names = ("off", *self._ways)
        todo = [c for c in self._cells if any(_key(c, n) not in record for n in names)]
        window = subject.data.window
        longest = max((c.length for c in todo), default=0)
        passes = len(names) + 1
        subject.progress.begin(longest + len(todo) * passes * window, self.name)
        if not todo:
            return
        first = next(iter(self._ways.values()), subject.retrieval())
        bank = read(subject, [first], [self._filler[:longest]], window)[0]
        for cell in todo:
            probe = self._probes[cell]
            with planted(subject, first, bank, probe, self._filler, window):
                yield from self._measure(subject, cell, probe, bank)
            subject.progress.advance(passes * window)

    def _measure(self, subject: Subject, cell: Cell, probe: Probe, bank: BankView) -> Iterator[Row]:
        length, scored = len(probe.tokens), len(probe.tokens) - probe.answer
        scoring = Scoring((length,), min(length, subject.data.window), scored, length)
        document = zlib.crc32(repr(cell).encode())  # each probe has a random draw of its own
        batch = window_batch(subject, [probe.tokens], scoring, [document])
        start = length - scoring.local
        yield self._row(subject, cell, "off", batch, None, probe, start)
        for name, retrieval in self._ways.items():
            yield self._row(
                subject, cell, name, batch, self._retrieved(subject, retrieval, bank, batch, probe), probe, start
            )

    def _retrieved(
        self, subject: Subject, retrieval: Retrieval, bank: BankView, batch: dict[str, Any], probe: Probe
    ) -> Any:
        if retrieval.config.selection != "similarity":
            return retrieval.retrieve(bank, batch, count=False)
        question = subject.tokenizer.decode(probe.tokens[probe.question : probe.answer])
        asking = embed_texts(retrieval, [question], subject.device, subject.hidden_states)
        return retrieve_for(retrieval, bank, [asking], int(batch["offset"][0]))

    def _row(
        self, subject: Subject, cell: Cell, name: str, batch: dict[str, Any], memory: Any, probe: Probe, start: int
    ) -> Row:
        losses, output = score(subject, batch, memory)
        answer = torch.from_numpy(probe.tokens[probe.answer :])
        with torch.no_grad(), subject.autocast():
            likeliest = subject.model.head.logits(output.hidden[0, -len(answer) - 1 : -1]).argmax(-1).cpu()
        row: Row = {**cell._asdict(), "setting": name, "nll": float(losses.double().sum()), "tokens": len(answer)}
        right = likeliest == answer
        row |= {"correct": int(right.all()), "right_tokens": int(right.sum())}
        row["local"] = int(probe.planted[0] >= start)
        size = subject.memory.chunk_size
        if memory is not None:
            found = memory.positions[memory.positions >= 0]
            row["hit"] = int(((found < probe.planted[1]) & (found + size > probe.planted[0])).any())
        return row

    def report(self, rows: list[Row]) -> Report:
        """Tables and figures."""
        return report(self, rows)


def _key(cell: Cell, setting: str) -> Row:
    return {**cell._asdict(), "setting": setting}


@contextmanager
def planted(
    subject: Subject, retrieval: Retrieval, bank: BankView, probe: Probe, filler: np.ndarray, window: int
) -> Iterator[None]:
    """The bank as if the probe's document had been read instead of its filler; then as it was."""
    document = np.concatenate([probe.tokens[: probe.question], filler[probe.question :]])
    stride = reading_stride(window, bank.chunk_size)
    every = window_offsets(sum(bank.entries(0).lengths.tolist()), window, stride)
    offsets = [at for at in every if any(start < at + window and at < end for start, end in probe.changed)]
    was = [_write(subject, retrieval, bank, document, offset, window) for offset in offsets]
    try:
        yield
    finally:
        for chunks in was:
            _put_back(bank, *chunks)


@torch.no_grad()
def _write(
    subject: Subject, retrieval: Retrieval, bank: BankView, tokens: np.ndarray, offset: int, window: int
) -> tuple[Retrieved, Tensor]:
    """Read one window and put its keys, values and embeddings where the bank has the chunks it stored.

    Returns:
        What was there: the record of those chunks, and their embeddings.
    """
    held = bank.entries(0)
    end = min(offset + window, int((held.positions + held.lengths).max()))
    ids = torch.from_numpy(tokens[offset:end].astype(np.int64))[None].to(subject.device)
    size = bank.chunk_size
    padded = torch.nn.functional.pad(ids, (0, -ids.shape[1] % size))
    with subject.autocast():
        sink = sink_before(subject.model, subject.tokenizer, offset, window, size)
        found = subject.model.capture(padded, bos=sink, hidden=True)
        keys, values = found["keys"][..., 0, :, :, :], found["values"][..., 0, :, :, :]
    positions = torch.arange(offset, end, size)
    positions[: (window - reading_stride(window, size)) // size if offset else 0] = -1  # stored with the window before
    match = (positions[:, None] == held.positions[None]).nonzero()
    was = bank.gather(match[None, :, 1], count=False)
    assert was is not None
    before = held.embeddings[match[:, 1]]
    bank.overwrite(0, keys, values, positions)
    batch = {"input_ids": padded, "length": torch.tensor([ids.shape[1]])}
    held.embeddings[match[:, 1]] = retrieval.embed(batch, hidden=found["hidden"])[0, match[:, 0]]
    return was, before


def _put_back(bank: BankView, was: Retrieved, embeddings: Tensor) -> None:
    """Undo :func:`_write`."""
    bank.overwrite(0, was.keys[..., 0, :, :, :], was.values[..., 0, :, :, :], was.positions[0])
    bank.entries(0).embeddings[was.entries[0]] = embeddings
