"""Perplexity over lengths of context and ways of choosing memory, with controls on the same tokens."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np

from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.cells import HINDSIGHT, LONGER, OFF, Cells, Text, Window
from lightning_memlong.evaluation.peers import Peer
from lightning_memlong.evaluation.perplexity_report import report
from lightning_memlong.evaluation.reading import read
from lightning_memlong.evaluation.record import Record, Row
from lightning_memlong.retrieval import Retrieval

Protocol = Literal["sliding", "reference"]
CONTROLS: dict[str, dict[str, Any]] = {
    "retrieved": {},
    "recent": {"selection": "recent"},
    "random": {"selection": "random"},
    "current (LEAKS)": {"query": "current"},
}
GOVERNED = {"enabled", "chunk_size", "capacity", "policy", "policy_args", "half_life", "save_keys_values",
            "index", "dtype", "storage", "storage_folder"}  # fmt: skip
"""Fields a setting cannot change: what is stored is the same in every cell, and all of it is kept."""


class PerplexityGrid(Evaluation):
    """Perplexity of the same tokens in every cell: lengths of context by ways of choosing memory.

    Of a context of L tokens the last ``data.window`` are local and the rest is memory. Every document is read once,
    window by window without memory, into a bank that keeps all of it (so the first chunks of a context were read with
    up to a window of the text before it); each setting then chooses among the chunks that lie in its context. Every
    table also has memory off, and the backbone with a longer plain window of as many tokens as window and retrieved
    chunks together.

    Args:
        corpora: Name -> a path, or options of the data group (class_path, path, hub_id, ...) that differ; null: the
            text of the data group alone.
        lengths: Tokens of context [tokens].
        settings: Name -> fields of the memory group that differ; {} is the memory as configured.
        protocol: sliding: every scored token has at least window - stride local tokens before it, the last stride
            tokens of each window are scored; reference: the published code's, documents cut into lengths without
            overlap, the last window of each is scored whole, mean of their losses.
        documents: Documents of a corpus, the first that are long enough [documents].
        windows: Windows scored of a document, spread evenly over what lies beyond the longest length [windows]; for
            reference: the most pieces of a document.
        longer_window: Also score the backbone with a window of as many tokens as window and retrieved chunks together.
        peers: Name -> another causal language model (name, folder or hub id), given the whole length as plain context
            as far as it was made for; scored on the same bytes.
        hindsight: Candidates tried one by one by what they do to the scored tokens themselves: an upper bound for
            choosing well at the longest length [chunks]; 0: leave it out.
        seed: Of bootstrap intervals.
    """

    name = "perplexity"
    keys = ("corpus", "document", "text", "window", "length", "setting")

    def __init__(
        self,
        corpora: dict[str, str | dict[str, Any]] | None = None,
        lengths: list[int] = [1024, 2048, 4096, 8192, 16384, 32768, 65536],  # noqa: B006  (never changed; shown)
        settings: dict[str, dict[str, Any]] = CONTROLS,
        protocol: Protocol = "sliding",
        documents: int = 4,
        windows: int = 8,
        longer_window: bool = True,
        peers: dict[str, str] = {},  # noqa: B006  (likewise)
        hindsight: int = 0,
        seed: int = 0,
    ) -> None:
        require_choice("evaluation.protocol", protocol, Protocol)
        for key, value in (("documents", documents), ("windows", windows)):
            require(value >= 1, f"evaluation.{key}", value, "1 or more", "raise it")
        require(bool(lengths) and min(lengths) >= 2, "evaluation.lengths", lengths, "2 or more tokens each", "raise")
        ok = hindsight == 0 or (hindsight > 0 and bool(settings))
        allowed = "0, or more chunks where there are settings to compare it with"
        require(ok, "evaluation.hindsight", hindsight, allowed, "raise it, or name settings")
        names = [*settings, *peers]  # unquoted, YAML reads off as a truth value
        taken = [n for n in names if n in (OFF, LONGER, HINDSIGHT) or not isinstance(n, str) or names.count(n) > 1]
        require(not taken, "evaluation.settings", taken, "names of their own, as text", "choose others")
        self.corpora, self.lengths, self.settings, self.protocol = corpora, sorted(set(lengths)), settings, protocol
        self.documents, self.windows, self.longer_window = documents, windows, longer_window
        self.peers, self.hindsight, self.seed = peers, hindsight, seed

    @property
    def reads_data(self) -> bool:
        """Whether the documents of the data group are used."""
        return self.corpora is None

    # ---- before anything is measured ----------------------------------------------------------------------

    def prepare(self, subject: Subject) -> None:
        """Check settings, find the documents, load encoders and peers."""
        self.retrievals: dict[str, Retrieval] = {}
        for name, options in self.settings.items():
            fixed = sorted(GOVERNED & {*options})
            key = f"evaluation.settings.{name}"
            require(not fixed, key, fixed, "other fields of the memory group", "set it for all: --memory.*")
            retrieval = subject.retrieval(options, key)
            leaks = retrieval.config.query == "current" and retrieval.config.selection == "similarity"
            self.retrievals[f"{name} (LEAKS)" if leaks and "LEAKS" not in name else name] = retrieval
        self.open_peers = {name: Peer(name, backbone, subject.device) for name, backbone in self.peers.items()}
        self._texts = [text for name, data in self._data(subject).items() for text in self._documents(name, data)]
        self.top_k = max((r.config.top_k for r in self.retrievals.values()), default=subject.memory.top_k)
        self._check(subject)
        self.longest = getattr(subject.model.config, "max_position_embeddings", None) or max(self.lengths)
        data = subject.data
        self.title = f"{subject.backbone}, window {data.window}, stride {data.stride}, {self.protocol}"
        self.local, self.stride, self.chunk_size = data.window, data.stride, subject.memory.chunk_size

    def _check(self, subject: Subject) -> None:
        chunk, stride = subject.memory.chunk_size, subject.data.stride
        least = stride + 1 if self.protocol == "sliding" else 2
        ok = all(length % chunk == 0 and length >= least for length in self.lengths)
        allowed = f"multiples of memory.chunk_size={chunk}" + (f" above data.stride={stride}" if least > 2 else "")
        require(ok, "evaluation.lengths", self.lengths, allowed, "change the lengths, or --data.stride")

    def _data(self, subject: Subject) -> dict[str, Any]:
        if self.corpora is None:
            return {subject.data.text_name: subject.data}
        return {name: subject.open_data(name, options) for name, options in self.corpora.items()}

    def _documents(self, corpus: str, data: Any) -> list[Text]:
        least = max(self.lengths) if self.protocol == "sliding" else max(min(self.lengths), data.window)
        found: list[Text] = []
        longest = 0
        for name, tokens in data.whole_documents("test"):
            longest = max(longest, len(tokens))
            if len(tokens) >= least:
                found.append(Text(corpus, name, np.asarray(tokens)))
            if len(found) == self.documents:
                break
        fix = f"lower the lengths, or read longer documents; the longest of {corpus} has {longest} tokens"
        require(bool(found), "evaluation.lengths", self.lengths, f"at most {longest} tokens for {corpus}", fix)
        return found

    def planned(self) -> list[Row]:
        """The cells of all documents."""
        alone = [([text], window) for text in self._texts for window in self._scorings([text])]
        return [cell for texts, window in alone for cell in self._cells(texts, window)]

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Row]:
        """One group of documents after the other; of each window all cells, so that no window is half measured."""
        rows = subject.data.batch_size
        corpora = [list(texts) for _, texts in groupby(self._texts, lambda text: text.corpus)]
        groups = [texts[i : i + rows] for texts in corpora for i in range(0, len(texts), rows)]
        todo = [(g, [s for s in self._scorings(g) if any(r not in record for r in self._cells(g, s))]) for g in groups]
        todo = [(group, scorings) for group, scorings in todo if scorings]
        subject.progress.begin(sum(self._work(*item) for item in todo), self.name)
        for group, scorings in todo:
            span = [text.tokens[: max(s.ends[row] for s in scorings)] for row, text in enumerate(group)]
            banks = read(subject, list(self.retrievals.values()), span, self.local) if self.retrievals else []
            for scoring in scorings:
                yield from Cells(self, subject, group, scoring, banks).rows()

    def _work(self, group: Sequence[Text], scorings: Sequence[Window]) -> int:
        """Tokens of all passes, roughly."""
        passes = sum(len(self.settings_at(length)) for length in self.lengths)
        reading = sum(max(s.ends[row] for s in scorings) for row in range(len(group))) if self.retrievals else 0
        return reading + len(scorings) * len(group) * self.local * passes

    def _scorings(self, group: Sequence[Text]) -> list[Window]:
        if self.protocol == "reference":
            return [w for length in self.lengths for w in self._pieces(group, length)]
        first = max(self.lengths)
        places = [np.linspace(first, len(t.tokens), self.windows).astype(int) for t in group]
        # Cut down to whole strides, so that all that lies before a window can be retrieved.
        ends = [np.unique(first + (p - first) // self.stride * self.stride) for p in places]
        # The first token of a window has nothing to be predicted from, so where windows do not overlap it is left out.
        scored = self.stride - int(self.stride == self.local)
        return [
            Window(tuple(int(e[number]) if number < len(e) else 0 for e in ends), tuple(self.lengths), scored)
            for number in range(max(map(len, ends)))
        ]

    def _pieces(self, group: Sequence[Text], length: int) -> list[Window]:
        """Documents cut into pieces of a length, of which the last window is scored whole."""
        counts = [min(self.windows, len(text.tokens) // length) for text in group]
        return [
            Window(
                tuple((number + 1) * length if number < count else 0 for count in counts),
                (length,),
                min(length, self.local) - 1,  # the first has nothing to be predicted from
            )
            for number in range(max(counts))
        ]

    def wide(self, length: int) -> int:
        """Tokens of the longer plain window."""
        return min(length, self.local + self.top_k * self.chunk_size)

    def settings_at(self, length: int) -> list[str]:
        """Where the whole context is local there is nothing to retrieve."""
        longer = [LONGER] if self.longer_window and self.wide(length) <= self.longest else []
        best = [HINDSIGHT] if self.hindsight and length == max(self.lengths) else []
        beyond = [*longer, *self.retrievals, *best] if length > self.local else []
        return [OFF, *beyond, *(name for name, peer in self.open_peers.items() if peer.takes(length))]

    def _cells(self, group: Sequence[Text], window: Window) -> list[Row]:
        """The columns that tell the measurements of a window from others."""
        return [
            {**text.facts, "window": window.ends[row], "length": length, "setting": name}
            for row, text in enumerate(group) if window.ends[row]
            for length in window.lengths for name in self.settings_at(length)
        ]  # fmt: skip

    def report(self, rows: list[Row]) -> Report:
        """Tables and figures."""
        return report(self, rows)
