"""One window of some documents, scored in every cell of a perplexity grid.

Legend: R documents read side by side, S scored tokens.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.hindsight import choose_with_hindsight
from lightning_memlong.evaluation.peers import Peer
from lightning_memlong.evaluation.reading import Scoring, score, window_batch
from lightning_memlong.evaluation.record import Row

OFF, LONGER, HINDSIGHT = "off", "longer window", "hindsight"


@dataclass(frozen=True)
class Text:
    """A document that is scored."""

    corpus: str
    name: str
    tokens: np.ndarray

    @cached_property
    def facts(self) -> Row:
        """What it is recognised by: another text under the same name is measured anew."""
        digest = hashlib.blake2b(self.tokens.astype(np.int64).tobytes(), digest_size=6).hexdigest()
        return {"corpus": self.corpus, "document": self.name, "text": digest}


@dataclass(frozen=True)
class Window:
    """A window of each of some documents, scored in all cells."""

    ends: tuple[int, ...]
    lengths: tuple[int, ...]
    scored: int


class Cells:
    """All cells of one window of some documents."""

    def __init__(
        self, grid: Any, subject: Subject, texts: Sequence[Text], window: Window, banks: Sequence[Any]
    ) -> None:
        self.grid, self.subject, self.texts, self.window = grid, subject, texts, window
        self.banks = dict(zip(grid.retrievals, banks, strict=bool(banks)))
        self.tokens, self.ids = [text.tokens for text in texts], [int(text.facts["text"], 16) for text in texts]
        self._known: dict[str, tuple[Tensor, Any]] = {}
        self._off: dict[int, Tensor] = {}
        self.spans = [self._span(row) for row in range(len(texts))]

    def rows(self) -> Iterator[Row]:
        """Measure them."""
        for length in self.window.lengths:
            local = min(length, self.grid.local)
            off = self._off.get(local)
            if off is None:
                off = self._off[local] = self._plain(local)
            for setting in self.grid.settings_at(length):
                losses, facts = self._losses(setting, length, off)
                self.subject.progress.advance(self.grid.local * len(self.texts))
                yield from self._rows(setting, length, losses, off, facts)

    def _plain(self, local: int) -> Tensor:
        scoring = Scoring(self.window.ends, local, self.window.scored, local)
        batch = window_batch(self.subject, self.tokens, scoring, self.ids)
        return self._scored(score(self.subject, batch)[0])

    def _scored(self, losses: Tensor) -> Tensor:
        return losses[:, -self.window.scored :]

    def _losses(self, setting: str, length: int, off: Tensor) -> tuple[Tensor, list[Row]]:
        nothing: list[Row] = [{} for _ in self.texts]
        if setting == OFF:
            return off, nothing
        if setting in self.grid.open_peers:
            return self._peer(self.grid.open_peers[setting], length, off), nothing
        if setting == LONGER:
            wide = self.grid.wide(length)
            if wide not in self._off:
                self._off[wide] = self._plain(wide)
            return self._off[wide], nothing
        scoring = Scoring(self.window.ends, self.grid.local, self.window.scored, length)
        batch = window_batch(self.subject, self.tokens, scoring, self.ids)
        if setting == HINDSIGHT:
            limit = off.sum(1)
            candidates, ways = self.grid.hindsight, self.grid.retrievals
            memory = choose_with_hindsight(self.subject, batch, candidates, ways, self.banks, limit)
        else:
            memory = self.grid.retrievals[setting].retrieve(self.banks[setting], batch, count=False)
        # Two settings that choose the same chunks are the same pass.
        key = "nothing" if memory is None else f"{memory.entries.tolist()}"
        if key not in self._known:
            losses, output = score(self.subject, batch, memory)
            mass = {str(layer): m.float().mean(1).cpu() for layer, m in output.attention_mass.items()}
            self._known[key] = self._scored(losses), mass
        losses, mass = self._known[key]
        return losses, [self._facts(row, memory, batch, mass, length) for row in range(len(self.texts))]

    def _facts(
        self, row: int, memory: Any, batch: Mapping[str, Tensor], mass: Mapping[str, Tensor], length: int
    ) -> Row:
        if memory is None:
            return {}
        each = len(memory.entries) // len(self.texts)
        mine = slice(row * each, (row + 1) * each)
        places, scores = memory.positions[mine].flatten(), memory.scores[mine].flatten()
        real = places >= 0
        distances = (int(batch["offset"][row]) - places[real]).tolist()
        facts: Row = {"chunks": len(distances), "distance": float(np.mean(distances)) if distances else None}
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

    def _span(self, row: int) -> Row:
        """How much text the scored tokens are."""
        end, count = self.window.ends[row], self.window.scored
        if not end:
            return {}
        text = self.subject.tokenizer.decode(self.tokens[row][end - count : end], clean_up_tokenization_spaces=False)
        before = self.subject.tokenizer.decode(self.tokens[row][max(0, end - count - 8) : end - count])
        inside = bool(before[-1:].strip()) and bool(text[:1].strip())  # a word that began before
        return {"tokens": count, "bytes": len(text.encode()), "words": len(text.split()) - int(inside)}

    def _rows(self, setting: str, length: int, losses: Tensor, off: Tensor, facts: list[Row]) -> Iterator[Row]:
        for row, text in enumerate(self.texts):
            if not (end := self.window.ends[row]):
                continue
            found = {**text.facts, "window": end, "length": length, "setting": setting}
            better = 0 if setting in self.grid.open_peers else int((losses[row] < off[row] - 1e-6).sum())
            yield {
                **found, **self.spans[row], "nll": float(losses[row].double().sum()),
                "nll_off": float(off[row].double().sum()), "improved": better, **facts[row],
            }  # fmt: skip
