"""Perplexity over lengths of context and ways of choosing memory, with controls on the same tokens."""

import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal

from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation.alternatives import TITLES, AlternativeKind, open_alternatives, prompting
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.documents import check_corpora, find_documents
from lightning_memlong.evaluation.grid import HINDSIGHT, LONGER, OFF, Grid, ScoredDocument
from lightning_memlong.evaluation.peers import Peer
from lightning_memlong.evaluation.perplexity_report import report_perplexity
from lightning_memlong.evaluation.record import Measurement, Record
from lightning_memlong.evaluation.scoring import read_documents
from lightning_memlong.evaluation.window_scorer import WindowScorer
from lightning_memlong.model import Reading, as_reading
from lightning_memlong.retrieval import CONTROL_SELECTIONS, Retrieval

ScoringProtocol = Literal["sliding", "reference"]
CONTROLS: dict[str, dict[str, Any]] = {
    "retrieved": {},
    "recent": {"selection": "recent"},
    "random": {"selection": "random"},
    "current (LEAKS)": {"query": "current"},
}


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
        settings: Name -> fields of the memory group that differ; {} is the memory as configured. Of the model group,
            ``model`` may hold how memory is read: position, memory_distance, memory_near, memory_weights,
            retrieval_layers.
        protocol: sliding: every scored token has at least window - stride local tokens before it, the last stride
            tokens of each window are scored; reference: the published code's, documents cut into lengths without
            overlap, the last window of each is scored whole, mean of their losses.
        documents: Documents of a corpus, the first that are long enough [documents].
        windows: Windows scored of a document, spread evenly over what lies beyond the longest length [windows]; for
            reference: the most pieces of a document.
        longer_window: Also score the backbone with a window of as many tokens as window and retrieved chunks together,
            or as many as it was made for if that is less.
        alternatives: What else could be done on the same weights, a row each: trained_window (the plain backbone with
            as long a window as it was made for), yarn and dynamic_ntk (the whole context in a window, positions
            stretched by transformers' own formulas), sinks (StreamingLLM: the first four tokens and a window's newest,
            the rest goes by), prompt (chunks that the first setting chooses, as text before the window, as many as
            fit).
        peers: Name -> another causal language model (name, folder or hub id), given the whole length as plain context
            as far as it was made for; scored on the same bytes.
        hindsight: Candidates tried one by one by what they do to the scored tokens themselves: an upper bound for
            choosing well at the longest length [chunks]; 0: leave it out.
        seed: Of bootstrap intervals.
    """

    name = "perplexity"
    reported = ("seed",)
    keys = ("corpus", "document", "text", "window", "length", "setting")
    whole = ("corpus", "document", "text")

    def __init__(
        self,
        corpora: dict[str, str | dict[str, Any]] | None = None,
        lengths: list[int] = [1024, 2048, 4096, 8192, 16384, 32768, 65536],  # noqa: B006  (never changed; shown)
        settings: dict[str, dict[str, Any]] = CONTROLS,
        protocol: ScoringProtocol = "sliding",
        documents: int = 8,
        windows: int = 4,
        longer_window: bool = True,
        alternatives: list[str] = [],  # noqa: B006  (likewise)
        peers: dict[str, str] = {},  # noqa: B006  (likewise)
        hindsight: int = 0,
        seed: int = 0,
    ) -> None:
        require_choice("evaluation.protocol", protocol, ScoringProtocol)
        for key, value in (("documents", documents), ("windows", windows)):
            require(value >= 1, f"evaluation.{key}", value, "1 or more", "raise it")
        require(bool(lengths) and min(lengths) >= 2, "evaluation.lengths", lengths, "2 or more tokens each", "raise")
        ok = hindsight == 0 or (hindsight > 0 and bool(settings))
        allowed = "0, or more chunks where there are settings to compare it with"
        require(ok, "evaluation.hindsight", hindsight, allowed, "raise it, or name settings")
        names = [*settings, *peers]  # unquoted, YAML reads off as a truth value
        taken = [
            n for n in names if n in (OFF, LONGER, HINDSIGHT, *TITLES) or not isinstance(n, str) or names.count(n) > 1
        ]
        require(not taken, "evaluation.settings", taken, "names of their own, as text", "choose others")
        check_corpora(corpora)
        self.corpora, self.lengths, self.settings, self.protocol = corpora, sorted(set(lengths)), settings, protocol
        self.documents, self.windows, self.longer_window = documents, windows, longer_window
        for kind in alternatives:
            require_choice("evaluation.alternatives", kind, AlternativeKind)
        self.alternatives, self.peers, self.hindsight, self.seed = alternatives, peers, hindsight, seed

    @property
    def reads_data(self) -> bool:
        """Whether the documents of the data group are used."""
        return self.corpora is None

    # ---- before anything is measured ----------------------------------------------------------------------

    def prepare(self, subject: Subject) -> None:
        """Check settings, find the documents, load encoders and peers."""
        retrievals, readings = self._ways(subject)
        peers = {name: Peer(name, backbone, subject.device) for name, backbone in self.peers.items()}
        least = max(self.lengths) if self.protocol == "sliding" else max(min(self.lengths), subject.data.window)
        lengths = ("evaluation.lengths", self.lengths)
        self._documents = find_documents(subject, self.corpora, self.documents, least, *lengths)
        self._check(subject)
        data = subject.data
        longest = getattr(subject.model.config, "max_position_embeddings", None) or max(self.lengths)
        chosen = prompting(subject, self.settings, longest) if "prompt" in self.alternatives else None
        most = chosen[1].config.top_k if chosen else 0
        self._grid = Grid(
            f"{subject.backbone}, window {data.window}, stride {data.stride}, {self.protocol}", self.protocol,
            self.lengths, self.windows, data.window, data.stride, subject.memory.chunk_size,
            max((r.config.retrieved for r in retrievals.values()), default=subject.memory.retrieved),
            longest, self.longer_window, self.hindsight, retrievals, readings, peers,
            open_alternatives(self.alternatives, subject, longest, most, data.stride), chosen, self.seed,
        )  # fmt: skip

    def _ways(self, subject: Subject) -> tuple[dict[str, Retrieval], dict[str, Reading | None]]:
        """The settings at work, by name; one whose query is what is being predicted is named so."""
        found: dict[str, Retrieval] = {}
        ways: dict[str, Reading | None] = {}
        for name, options in self.settings.items():
            of_model = options.get("model")
            options = {field: value for field, value in options.items() if field != "model"}
            key = f"evaluation.settings.{name}"
            retrieval = subject.row_retrieval(options, key)
            leaks = retrieval.config.query == "current" and retrieval.config.selection not in CONTROL_SELECTIONS
            title = f"{name} (LEAKS)" if leaks and "LEAKS" not in name else name
            found[title] = retrieval
            ways[title] = as_reading(subject.model, of_model, f"{key}.model") if of_model else None
        return found, ways

    def _check(self, subject: Subject) -> None:
        chunk, stride = subject.memory.chunk_size, subject.data.stride
        least = stride + 1 if self.protocol == "sliding" else 2
        ok = all(length % chunk == 0 and length >= least for length in self.lengths)
        allowed = f"multiples of memory.chunk_size={chunk}" + (f" above data.stride={stride}" if least > 2 else "")
        require(ok, "evaluation.lengths", self.lengths, allowed, "change the lengths, or --data.stride")

    @property
    def remarks(self) -> list[str]:
        """Peers that are left out at some lengths."""
        told = []
        for name, peer in self._grid.peers.items():
            if beyond := [length for length in self.lengths if not peer.takes(length)]:
                told.append(
                    f"evaluation.peers.{name}: made for {peer.longest:,} tokens; left out at "
                    f"{', '.join(f'{length:,}' for length in beyond)}."
                )
        return told

    def planned(self) -> list[Measurement]:
        """The cells of all documents."""
        return [key for document in self._documents for key in self._keys_of(document)]

    def _keys_of(self, document: ScoredDocument) -> list[Measurement]:
        return [k for window in self._grid.windows_of([document]) for k in self._grid.keys_of([document], window)]

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Measurement]:
        """One group of documents after the other; of each window all cells, so that no window is half measured."""
        grid, rows = self._grid, subject.data.batch_size
        left = [d for d in self._documents if any(key not in record for key in self._keys_of(d))]
        corpora = [list(documents) for _, documents in groupby(left, lambda d: d.corpus)]
        groups = [documents[i : i + rows] for documents in corpora for i in range(0, len(documents), rows)]
        todo = [
            (g, [w for w in grid.windows_of(g) if any(key not in record for key in grid.keys_of(g, w))]) for g in groups
        ]
        todo = [(group, windows) for group, windows in todo if windows]
        subject.progress.begin(sum(grid.work(*item) for item in todo), self.name)
        for group, windows in todo:
            span = [document.tokens[: max(w.ends[row] for w in windows)] for row, document in enumerate(group)]
            retrievals = list(grid.retrievals.values())
            start = time.perf_counter()
            banks = read_documents(subject, retrievals, span, grid.local) if retrievals else []
            reading = (time.perf_counter() - start) / sum(map(len, span))
            for window in windows:
                yield from WindowScorer(grid, subject, group, window, banks, reading).measure()

    def report(self, measurements: list[Measurement]) -> Report:
        """Tables and figures."""
        return report_perplexity(self._grid, measurements)
