"""What one validation saw, for its pictures and texts."""

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_memlong.bank import Retrieved
from lightning_memlong.model import MemLongOutput

from .figures import draw_map

TOKENS_SHOWN = 12
"""Of those that gained most."""
BEFORE = 12
"""Tokens shown before each of them."""
EXCERPT = 400
"""Characters shown of a window's end and of a chunk."""


@dataclass
class Sample:
    """A window, what it retrieved, and its losses with memory and without."""

    gain: float
    """Mean loss without memory, less that with memory [nats]."""
    batch: Mapping[str, Any]
    on: MemLongOutput
    off: MemLongOutput
    chunks: list[tuple[int, float, list[int]]]
    """Of each chunk it retrieved: place [tokens], similarity, token ids; most similar first."""


class ValidationRecord:
    """Filled window by window; keeps the outputs of two windows only.

    Args:
        name_of: What a document is called, by its number.
    """

    def __init__(self, name_of: Callable[[int], str] = str) -> None:
        self._name_of = name_of
        self.places: dict[int, list[tuple[int, int, float]]] = {}
        """Document -> (where it was read, where a chunk was retrieved from, similarity)."""
        self.mass: dict[int, list[Tensor]] = {}
        """Layer -> shares of its attention on memory, (H,) a window."""
        self._text: dict[int, list[int]] = {}
        self._best: Sample | None = None
        self._worst: Sample | None = None
        self._size = 0

    def add(self, batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Note a batch of windows."""
        memory: Retrieved | None = batch["memory"]
        rows = len(batch["document_id"])
        for row in range(rows):
            self._read(batch, row)
        if memory is None:
            return
        self._size = memory.chunk_size
        reading = memory.readers(rows).cpu()
        for layer, mass in outputs["memory_on"].attention_mass.items():
            self.mass.setdefault(layer, []).extend(mass.float().cpu()[reading].unbind())
        groups = len(memory.positions) // rows
        step = batch["input_ids"].shape[1] // groups
        for row, document in enumerate(batch["document_id"].tolist()):
            for group in range(groups):
                place, at = int(batch["offset"][row]) + group * step, row * groups + group
                found = zip(memory.positions[at].tolist(), memory.scores[at].tolist(), strict=True)
                self.places.setdefault(document, []).extend((place, p, s) for p, s in found if p >= 0)
        if rows == 1 and "memory_off" in outputs:
            self._choose(batch, outputs, memory)

    def _read(self, batch: Mapping[str, Any], row: int) -> None:
        """Keep the text, to show what is retrieved from it later."""
        read = self._text.setdefault(int(batch["document_id"][row]), [])
        del read[int(batch["offset"][row]) :]
        read += batch["input_ids"][row, : int(batch["length"][row])].tolist()

    def _choose(self, batch: Mapping[str, Any], outputs: Mapping[str, Any], memory: Retrieved) -> None:
        on, off = outputs["memory_on"], outputs["memory_off"]
        gain = float(off.loss - on.loss)
        best = self._best is None or gain > self._best.gain
        worst = self._worst is None or gain < self._worst.gain
        if not (best or worst):
            return
        text = self._text[int(batch["document_id"][0])]
        scores: dict[int, float] = {}
        for place, score in zip(memory.positions.flatten().tolist(), memory.scores.flatten().tolist(), strict=True):
            if place >= 0:
                scores[place] = max(score, scores.get(place, score))
        chunks = [(p, s, text[p : p + self._size]) for p, s in sorted(scores.items(), key=lambda item: -item[1])]
        kept = {k: v for k, v in batch.items() if k != "memory"}  # the keys and values are not shown
        sample = Sample(gain, kept, _without_kv(on), _without_kv(off), chunks)
        self._best, self._worst = sample if best else self._best, sample if worst else self._worst

    # ---- what is shown ------------------------------------------------------------------------------------

    def map(self) -> Figure | None:
        """Where the windows of the longest document retrieved from."""
        if not self.places:
            return None
        document = max(self.places, key=lambda d: len(self.places[d]))
        return draw_map(self.places[document], f"document {self._name_of(document)}", self._size)

    def mean_mass(self) -> dict[int, Tensor]:
        """Layer -> (H,) mean over windows [%]."""
        return {layer: 100 * torch.stack(found).mean(dim=0) for layer, found in sorted(self.mass.items())}

    @torch.no_grad()
    def texts(self, tokenizer: Any) -> dict[str, str]:
        """Markdown about the window that gained most by memory, and the one that lost most."""
        found = {"memory/window_that_gained_most": self._best, "memory/window_that_lost_most": self._worst}
        if self._best is self._worst:
            found.pop("memory/window_that_lost_most")
        return {
            name: _markdown(sample, tokenizer, self._name_of) for name, sample in found.items() if sample is not None
        }


def _without_kv(output: MemLongOutput) -> MemLongOutput:
    """The output to keep; other observers may still ask the one that was given for keys and values."""
    kept = copy(output)
    kept.drop_kv()
    return kept


def _markdown(sample: Sample, tokenizer: Any, name_of: Callable[[int], str]) -> str:
    batch, name = sample.batch, _plain(name_of(int(sample.batch["document_id"][0])))
    labels, ids = batch["labels"], batch["input_ids"][0].tolist()
    on, off = sample.on.token_losses(labels)[0].cpu(), sample.off.token_losses(labels)[0].cpu()
    offset, length = int(batch["offset"][0]), int(batch["length"][0])
    lines = [
        f"**Document {name}, tokens {offset:,} to {offset + length:,}**: perplexity "
        f"{float(sample.on.loss.exp()):.2f} with memory, {float(sample.off.loss.exp()):.2f} without.",  # type: ignore[union-attr]
        "", "Its end:", "", _quoted(tokenizer, ids[:length], end=True), "",
        "### What it retrieved", "",
    ]  # fmt: skip
    for place, score, chunk in sample.chunks[:8]:
        similarity = "" if math.isnan(score) else f", similarity {score:.3f}"  # recent and random have none
        lines.append(f"- **at {place:,}**{similarity}: {_line(tokenizer, chunk)}")
    lines += ["", "### Tokens that gained most (loss with memory off and on)", ""]
    for place in (off - on).argsort(descending=True)[:TOKENS_SHOWN].tolist():
        before = _line(tokenizer, ids[max(0, place - BEFORE) : place], end=True)
        token = _line(tokenizer, ids[place : place + 1])
        lines.append(f"- {before} **{token}** {float(off[place]):.2f} to {float(on[place]):.2f}")
    return "\n".join(lines)


def _text(tokenizer: Any, ids: list[int], end: bool) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text[-EXCERPT:] if end else text[:EXCERPT]


def _quoted(tokenizer: Any, ids: list[int], end: bool = False) -> str:
    return "\n".join(f"    {line}" for line in _text(tokenizer, ids, end).splitlines())


def _line(tokenizer: Any, ids: list[int], end: bool = False) -> str:
    """Text on one line, without Markdown."""
    return _plain(_text(tokenizer, ids, end)).strip() or "␣"


def _plain(text: str) -> str:
    text = text.replace("\n", "⏎ ")
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text
