"""What a perplexity grid scores, once prepared: windows of documents, and the cells of each, lengths by settings."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_memlong.evaluation.alternatives import Alternative, TrainedWindow
from lightning_memlong.evaluation.peers import Peer
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.model import Reading
from lightning_memlong.retrieval import Retrieval

OFF, LONGER, HINDSIGHT = "off", "longer window", "hindsight"


@dataclass(frozen=True)
class ScoredDocument:
    """A document that is scored."""

    corpus: str
    name: str
    tokens: np.ndarray

    @cached_property
    def facts(self) -> Measurement:
        """What it is recognised by: another text under the same name is measured anew."""
        digest = hashlib.blake2b(self.tokens.astype(np.int64).tobytes(), digest_size=6).hexdigest()
        return {"corpus": self.corpus, "document": self.name, "text": digest}


@dataclass(frozen=True)
class ScoredWindow:
    """A window of each of some documents, scored in all cells."""

    ends: tuple[int, ...]
    """Of each document, the place after the last scored token; 0: the document has no such window."""
    lengths: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Grid:
    """Settings by lengths, on windows of one size."""

    title: str
    protocol: str
    lengths: Sequence[int]
    """Tokens of context, ascending."""
    windows: int
    """Windows scored of a document; for protocol reference: the most pieces."""
    local: int
    """Tokens of a window."""
    stride: int
    chunk_size: int
    top_k: int
    """Most chunks any setting retrieves."""
    longest: int
    """Tokens the backbone was made for."""
    longer_window: bool
    hindsight: int
    """Candidates tried; 0: the setting is left out."""
    retrievals: Mapping[str, Retrieval]
    readings: Mapping[str, Reading | None]
    """Of each of these settings, how the model reads what it chose; None: as configured."""
    peers: Mapping[str, Peer]
    alternatives: Mapping[str, Alternative]
    prompting: tuple[str, Retrieval] | None
    """How the chunks of a prompt are chosen: the setting whose bank is searched, and the way, with as many as fit."""
    seed: int

    def wide(self, length: int) -> int:
        """Tokens of the longer plain window."""
        return min(length, max(self.local, min(self.local + self.top_k * self.chunk_size, self.longest)))

    def settings_at(self, length: int) -> list[str]:
        """Where the whole context is local there is nothing to retrieve."""
        longer = [LONGER] if self.longer_window and self.wide(length) > self.local else []
        best = [HINDSIGHT] if self.hindsight and length == max(self.lengths) else []
        beyond = [*longer, *self.retrievals, *best] if length > self.local else []
        instead = [name for name, way in self.alternatives.items() if way.takes(length)]
        if longer and self.wide(length) >= min(length, self.longest):  # the same window
            instead = [name for name in instead if name != TrainedWindow.title]
        return [OFF, *beyond, *instead, *(name for name, peer in self.peers.items() if peer.takes(length))]

    def windows_of(self, documents: Sequence[ScoredDocument]) -> list[ScoredWindow]:
        """All windows that are scored of documents read side by side."""
        if self.protocol == "reference":
            return [w for length in self.lengths for w in self._pieces(documents, length)]
        first = max(self.lengths)
        places = [np.linspace(first, len(d.tokens), self.windows).astype(int) for d in documents]
        # Cut down to whole strides, so that all that lies before a window can be retrieved.
        ends = [np.unique(first + (p - first) // self.stride * self.stride) for p in places]
        # The first token of a window has nothing to be predicted from, so where windows do not overlap it is left out.
        scored = self.stride - int(self.stride == self.local)
        return [
            ScoredWindow(tuple(int(e[number]) if number < len(e) else 0 for e in ends), tuple(self.lengths), scored)
            for number in range(max(map(len, ends)))
        ]

    def _pieces(self, documents: Sequence[ScoredDocument], length: int) -> list[ScoredWindow]:
        """Documents cut into pieces of a length, of which the last window is scored whole."""
        counts = [min(self.windows, len(d.tokens) // length) for d in documents]
        return [
            ScoredWindow(
                tuple((number + 1) * length if number < count else 0 for count in counts),
                (length,),
                min(length, self.local) - 1,  # the first has nothing to be predicted from
            )
            for number in range(max(counts))
        ]

    def keys_of(self, documents: Sequence[ScoredDocument], window: ScoredWindow) -> list[Measurement]:
        """The columns that tell the measurements of a window from others."""
        return [
            {**document.facts, "window": window.ends[row], "length": length, "setting": name}
            for row, document in enumerate(documents) if window.ends[row]
            for length in window.lengths for name in self.settings_at(length)
        ]  # fmt: skip

    def work(self, documents: Sequence[ScoredDocument], windows: Sequence[ScoredWindow]) -> int:
        """Tokens of all passes, roughly."""
        passes = sum(len(self.settings_at(length)) for length in self.lengths)
        reading = sum(max(w.ends[row] for w in windows) for row in range(len(documents))) if self.retrievals else 0
        return reading + len(windows) * len(documents) * self.local * passes
