"""One window of some documents, scored in every cell of a perplexity grid.

Legend: R documents read side by side, S scored tokens.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.grid import HINDSIGHT, LONGER, OFF, Grid, ScoredDocument, ScoredWindow
from lightning_memlong.evaluation.hindsight import choose_with_hindsight
from lightning_memlong.evaluation.peers import Peer
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.scoring import ScoredSpans, score_windows, window_batch
from lightning_memlong.model import reading


class WindowScorer:
    """Scores one window of some documents in all cells of a grid."""

    def __init__(
        self,
        grid: Grid,
        subject: Subject,
        documents: Sequence[ScoredDocument],
        window: ScoredWindow,
        banks: Sequence[BankView],
    ) -> None:
        self.grid, self.subject, self.documents, self.window = grid, subject, documents, window
        self.banks = dict(zip(grid.retrievals, banks, strict=bool(banks)))
        self.tokens, self.ids = [d.tokens for d in documents], [int(d.facts["text"], 16) for d in documents]
        self._known: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
        self._off: dict[int, Tensor] = {}
        self.sizes = [self._size(row) for row in range(len(documents))]

    def measure(self) -> Iterator[Measurement]:
        """Score each cell."""
        for length in self.window.lengths:
            local = min(length, self.grid.local)
            off = self._off.get(local)
            if off is None:
                off = self._off[local] = self._plain(local)
            for setting in self.grid.settings_at(length):
                losses, facts = self._losses(setting, length, off)
                self.subject.progress.advance(self.grid.local * len(self.documents))
                yield from self._measured(setting, length, losses, off, facts)

    def _plain(self, local: int) -> Tensor:
        spans = ScoredSpans(self.window.ends, local, self.window.scored, local)
        batch = window_batch(self.subject, self.tokens, spans, self.ids)
        return self._scored(score_windows(self.subject, batch)[0])

    def _scored(self, losses: Tensor) -> Tensor:
        return losses[:, -self.window.scored :]

    def _losses(self, setting: str, length: int, off: Tensor) -> tuple[Tensor, list[Measurement]]:
        nothing: list[Measurement] = [{} for _ in self.documents]
        if setting == OFF:
            return off, nothing
        if setting in self.grid.peers:
            return self._peer(self.grid.peers[setting], length, off), nothing
        if setting == LONGER:
            wide = self.grid.wide(length)
            if wide not in self._off:
                self._off[wide] = self._plain(wide)
            return self._off[wide], nothing
        spans = ScoredSpans(self.window.ends, self.grid.local, self.window.scored, length)
        batch = window_batch(self.subject, self.tokens, spans, self.ids)
        if setting == HINDSIGHT:
            limit = off.sum(1)
            candidates, ways = self.grid.hindsight, self.grid.retrievals
            memory = choose_with_hindsight(self.subject, batch, candidates, ways, self.banks, limit)
        else:
            memory = self.grid.retrievals[setting].retrieve(self.banks[setting], batch, count=False)
        # Two settings that choose the same chunks, and read them alike, are the same pass.
        way = self.grid.readings.get(setting)
        key = "nothing" if memory is None else f"{memory.entries.tolist()} {memory.top_k} {id(way)}"
        if key not in self._known:
            with reading(self.subject.model, way):
                losses, output = score_windows(self.subject, batch, memory)
            mass = {str(layer): m.float().mean(1).cpu() for layer, m in output.attention_mass.items()}
            self._known[key] = self._scored(losses), mass
        losses, mass = self._known[key]
        return losses, [self._facts(row, memory, batch, mass, length) for row in range(len(self.documents))]

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

    def _peer(self, peer: Peer, length: int, off: Tensor) -> Tensor:
        """Losses of another model; only their sum over the scored text means anything, so it stands in the first."""
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
        return {"tokens": count, "bytes": len(text.encode()), "words": len(text.split()) - int(inside)}

    def _measured(
        self, setting: str, length: int, losses: Tensor, off: Tensor, facts: list[Measurement]
    ) -> Iterator[Measurement]:
        for row, document in enumerate(self.documents):
            if not (end := self.window.ends[row]):
                continue
            found = {**document.facts, "window": end, "length": length, "setting": setting}
            better = 0 if setting in self.grid.peers else int((losses[row] < off[row] - 1e-6).sum())
            yield {
                **found, **self.sizes[row], "nll": float(losses[row].double().sum()),
                "nll_off": float(off[row].double().sum()), "improved": better, **facts[row],
            }  # fmt: skip
