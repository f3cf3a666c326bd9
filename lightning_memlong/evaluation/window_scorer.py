"""One window of some documents, scored in every cell of a perplexity grid.

Legend: R documents read side by side, S scored tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.evaluation.alternatives import TrainedWindow
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.cost import computing_bytes, memory_bytes, token_bytes
from lightning_memlong.evaluation.grid import HINDSIGHT, LONGER, OFF, Grid, ScoredDocument, ScoredWindow
from lightning_memlong.evaluation.hindsight import choose_with_hindsight
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.scoring import ScoredSpans, score_windows, window_batch
from lightning_memlong.evaluation.token_kinds import sums_of, token_kinds
from lightning_memlong.model import reading

TORN = "\ufffd"
"""What a tokenizer writes for a byte that is no character."""


@dataclass(frozen=True)
class Pass:
    """What one way of reading gave for the scored tokens of all rows."""

    losses: Tensor
    """(R, S) float32, on the CPU."""
    mass: Mapping[str, Tensor]
    """Layer -> share of attention on memory (R,)."""
    seconds: float
    """From the text to the losses, of one row [s]."""
    facts: Sequence[Measurement] = ()
    """Of each row, where there is something to say."""


class WindowScorer:
    """Scores one window of some documents in all cells of a grid.

    Args:
        grid: The cells.
        subject: Whose model.
        documents: R documents.
        window: Of each of them.
        banks: One for each way of choosing.
        reading_seconds: What it took to read a token into them, of one row [s].
    """

    def __init__(
        self,
        grid: Grid,
        subject: Subject,
        documents: Sequence[ScoredDocument],
        window: ScoredWindow,
        banks: Sequence[BankView],
        reading_seconds: float = 0.0,
    ) -> None:
        self.grid, self.subject, self.documents, self.window = grid, subject, documents, window
        self.banks = dict(zip(grid.retrievals, banks, strict=bool(banks)))
        self.tokens, self.ids = [d.tokens for d in documents], [int(d.facts["text"], 16) for d in documents]
        self.reading_seconds = reading_seconds
        self._known: dict[str, Pass] = {}
        self._windows: set[int] = set()
        self.sizes = [self._size(row) for row in range(len(documents))]

    def measure(self) -> Iterator[Measurement]:
        """Score each cell; those of a length come together, since only then its tokens can be told apart."""
        for length in self.window.lengths:
            local = min(length, self.grid.local)
            found = []
            for setting in self.grid.settings_at(length):
                found.append((setting, self._pass(setting, length, local)))
                self.subject.progress.advance(self.grid.local * len(self.documents))
            kinds = self._kinds(length)
            for setting, done in found:
                yield from self._measured(setting, length, done, self._plain(local).losses, kinds)

    def _once(self, key: str, compute: Callable[[], tuple[Tensor, dict[str, Tensor]]]) -> Pass:
        """A pass that several cells share is made, and timed, once."""
        if key not in self._known:
            start = time.perf_counter()
            losses, mass = compute()
            self._known[key] = Pass(losses, mass, (time.perf_counter() - start) / len(self.documents))
        return self._known[key]

    def _plain(self, local: int) -> Pass:
        """The backbone alone with a window."""

        def compute() -> tuple[Tensor, dict[str, Tensor]]:
            return self._scored(score_windows(self.subject, self._batch(local, local))[0]), {}

        self._windows.add(local)
        return self._once(f"window {local}", compute)

    def _batch(self, local: int, context: int) -> dict[str, Any]:
        """The windows of all rows, of so many tokens, and where what may be known of the text begins."""
        spans = ScoredSpans(self.window.ends, local, self.window.scored, context)
        return window_batch(self.subject, self.tokens, spans, self.ids)

    def _scored(self, losses: Tensor) -> Tensor:
        return losses[:, -self.window.scored :]

    def _pass(self, setting: str, length: int, local: int) -> Pass:
        off = self._plain(local)
        if setting == OFF:
            return off
        if setting in self.grid.peers:
            return self._once(f"{setting} {length}", lambda: (self._peer(setting, length, off.losses), {}))
        if setting in self.grid.alternatives:
            return self._once(f"{setting} {length}", lambda: (self._alternative(setting, length, off.losses), {}))
        if setting == LONGER:
            return self._plain(self.grid.wide(length))
        return self._with_memory(setting, length, off.losses)

    def _with_memory(self, setting: str, length: int, off: Tensor) -> Pass:
        batch = self._batch(self.grid.local, length)
        start = time.perf_counter()
        if setting == HINDSIGHT:
            limit = off.sum(1)
            candidates, ways = self.grid.hindsight, self.grid.retrievals
            memory = choose_with_hindsight(self.subject, batch, candidates, ways, self.banks, limit)
        else:
            memory = self.grid.retrievals[setting].retrieve(self.banks[setting], batch, count=False)
        choosing = (time.perf_counter() - start) / len(self.documents)
        # Two settings that choose the same chunks, and read them alike, are the same pass.
        way = self.grid.readings.get(setting)
        key = "nothing" if memory is None else f"{memory.entries.tolist()} {memory.top_k} {id(way)}"

        def compute() -> tuple[Tensor, dict[str, Tensor]]:
            with reading(self.subject.model, way):
                losses, output = score_windows(self.subject, batch, memory)
            mass = {str(layer): m.float().mean(1).cpu() for layer, m in output.attention_mass.items()}
            return self._scored(losses), mass

        done = self._once(key, compute)
        facts = [self._facts(row, memory, batch, done.mass, length) for row in range(len(self.documents))]
        before = choosing + self.reading_seconds * max(0, length - self.grid.local)
        return replace(done, facts=facts, seconds=done.seconds + before)

    def _alternative(self, setting: str, length: int, off: Tensor) -> Tensor:
        way = self.grid.alternatives[setting]
        chunks = self._chunks(length) if way.needs_chunks else [[] for _ in self.documents]
        losses = torch.zeros_like(off)
        for row, end in enumerate(self.window.ends):
            if end:
                context = self.tokens[row][max(0, end - length) : end]
                losses[row] = way.losses(self.subject, context, self.window.scored, chunks[row])
        return losses

    def _chunks(self, length: int) -> list[list[int]]:
        """Where the chunks of each document's prompt begin in its context."""
        assert self.grid.prompting is not None
        name, retrieval = self.grid.prompting
        batch = self._batch(self.grid.local, length)
        memory = retrieval.retrieve(self.banks[name], batch, count=False)
        if memory is None:
            return [[] for _ in self.documents]
        begin = batch["memory_start"].tolist()
        places = memory.positions.view(len(self.documents), -1).tolist()
        return [[p - begin[row] for p in dict.fromkeys(of) if p >= 0] for row, of in enumerate(places)]

    def _kinds(self, length: int) -> list[dict[str, np.ndarray]]:
        """Of each document at the longest length: which of the scored tokens are of which kind.

        The report tells them apart beside the alternatives; else nobody asks.
        """
        if not self.grid.alternatives or length != max(self.window.lengths) or length <= self.grid.local:
            return []
        off, widest = self._plain(self.grid.local).losses, max(self._windows)
        trained = self._known.get(f"{TrainedWindow.title} {length}")
        long = trained.losses if trained else self._plain(widest).losses if widest > self.grid.local else None
        return [
            token_kinds(
                self.tokens[row][max(0, end - length) : end], self.window.scored, self.grid.local,
                off[row].double().numpy(), None if long is None else long[row].double().numpy(),
            ) if end else {}
            for row, end in enumerate(self.window.ends)
        ]  # fmt: skip

    def _facts(
        self, row: int, memory: Retrieved | None, batch: Mapping[str, Tensor], mass: Mapping[str, Tensor], length: int
    ) -> Measurement:
        if memory is None:
            return {}
        each = len(memory.entries) // len(self.documents)
        mine = slice(row * each, (row + 1) * each)
        places, scores = memory.positions[mine].flatten(), memory.scores[mine].flatten()
        real = places >= 0
        distances = (int(batch["offset"][row]) - places[real]).tolist()
        facts: Measurement = {"chunks": len(distances), "distance": float(np.mean(distances)) if distances else None}
        known = bool(real.any()) and not bool(scores[real].isnan().any())  # the controls have no scores
        facts["nearest_distance"] = distances[int(scores[real].argmax())] if known else None
        if length == max(self.window.lengths):
            facts["mass"] = {layer: round(float(m[row]), 5) for layer, m in mass.items()}
        return facts

    def _peer(self, setting: str, length: int, off: Tensor) -> Tensor:
        """Losses of another model; only their sum over the scored text means anything, so it stands in the first."""
        peer = self.grid.peers[setting]
        losses = torch.zeros_like(off)
        for row, end in enumerate(self.window.ends):
            if end:
                losses[row, 0] = peer.loss(self.tokens[row], end, length, self.window.scored, self.subject)
        return losses

    def _size(self, row: int) -> Measurement:
        """How much text the scored tokens are."""
        end, count = self.window.ends[row], self.window.scored
        if not end:
            return {}
        text = self.subject.tokenizer.decode(self.tokens[row][end - count : end], clean_up_tokenization_spaces=False)
        before = self.subject.tokenizer.decode(self.tokens[row][max(0, end - count - 8) : end - count])
        inside = bool(before[-1:].strip()) and bool(text[:1].strip())  # a word that began before
        torn = len(text) - len(text.strip(TORN))  # pieces of characters at the ends, a byte each as far as one can know
        return {"tokens": count, "bytes": len(text.encode()) - 2 * torn, "words": len(text.split()) - int(inside)}

    def _held(self, setting: str, length: int) -> int:
        """Bytes of keys and values that are held."""
        grid = self.grid
        if setting in grid.peers:
            return grid.peers[setting].held(length)
        if setting in grid.retrievals or setting == HINDSIGHT:
            return memory_bytes(self.subject, grid.local, length)
        if setting in grid.alternatives:
            tokens = grid.alternatives[setting].held(length)
        else:
            tokens = grid.wide(length) if setting == LONGER else min(length, grid.local)
        return tokens * token_bytes(self.subject.model.backbone, element=computing_bytes(self.subject))

    def _measured(
        self, setting: str, length: int, done: Pass, off: Tensor, kinds: list[dict[str, np.ndarray]]
    ) -> Iterator[Measurement]:
        losses, alone = done.losses, setting in self.grid.peers
        for row, document in enumerate(self.documents):
            if not (end := self.window.ends[row]):
                continue
            found = {**document.facts, "window": end, "length": length, "setting": setting}
            better = 0 if alone else int((losses[row] < off[row] - 1e-6).sum())
            facts = dict(done.facts[row]) if done.facts else {}
            if kinds and not alone and setting != OFF:
                facts["kinds"] = sums_of(kinds[row], losses[row].double().numpy(), off[row].double().numpy())
            yield {
                **found, **self.sizes[row], "nll": float(losses[row].double().sum()),
                "nll_off": float(off[row].double().sum()), "improved": better,
                "seconds": round(done.seconds, 4), "held": self._held(setting, length), **facts,
            }  # fmt: skip
