"""What a bank that forgets is worth against one that keeps everything: policies of eviction, by capacity."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

from lightning_memlong.bank import BankView
from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.documents import check_corpora, find_documents
from lightning_memlong.evaluation.eviction_questions import Questions
from lightning_memlong.evaluation.eviction_replay import AS_NUMBERS, Replay, embedded
from lightning_memlong.evaluation.eviction_report import ASKED, EVERYTHING, SILENT, report_eviction
from lightning_memlong.evaluation.eviction_windows import WindowsOfOne
from lightning_memlong.evaluation.grid import OFF, ScoredDocument
from lightning_memlong.evaluation.planted_bank import planted_bank
from lightning_memlong.evaluation.record import Measurement, Record
from lightning_memlong.evaluation.scoring import read_documents
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.text import window_offsets
from lightning_memlong.text.planting import Probe, plant_facts

FactKind = Literal["key_value", "passage"]
POLICIES: dict[str, dict[str, Any]] = {
    "retrieval frequency": {"policy": "retrieval_frequency"},
    "frequency, oldest not dropped": {"policy": "retrieval_frequency", "policy_args": {"drop_oldest": 0.0}},
    "fifo": {"policy": "fifo"},
    "lru": {"policy": "lru"},
    "score": {"policy": "score"},
    "attention received": {"policy": "retrieval_frequency", "use": "attention"},
}
VARIED = ("policy", "policy_args", "use", "half_life")
"""Fields of the memory group that say what is evicted."""
BETWEEN = (0.05, 0.1)
"""Depths that facts are planted between."""


class Cell(NamedTuple):
    """A policy at a capacity; for memory off and for the bank that keeps everything, 0."""

    policy: str
    capacity: int


class EvictionGrid(Evaluation):
    """Policies of eviction by capacities, against a bank that keeps everything and against memory off.

    Every document is read once, window by window without memory, into a bank that keeps all of it. For each policy and
    capacity it is then read again into a real bank of that capacity, as training reads it: each window
    (``data.window``, ``data.stride``) retrieves, which counts as use, and stores its new chunks, and a full bank
    evicts. All cells so have the same keys and values, and differ in what they still have. Use by attention takes a
    pass of the model for each window.

    Measured are the perplexity of the same tokens in all cells; facts planted early, asked for on the way or never
    before the end; and what was evicted. Chunks are searched by an exact index, once a window.

    Args:
        corpora: Name -> a path, or options of the data group that differ; null: the text of the data group alone.
        length: Tokens of a document that are read [tokens].
        capacities: Sizes of the bank [tokens].
        policies: Name -> fields of the memory group that differ: policy, policy_args, use, half_life.
        documents: Documents of a corpus, the first that are long enough [documents].
        windows: Windows scored of a document, evenly spread over its second half [windows].
        facts: Facts planted in a document at 5 to 10 % of its length, which is read twice with them: asked for on the
            way as well, and never before the end [facts]; 0: none.
        fact_kind: key_value: a word and its number; passage: 96 words, whose first half asks for the second.
        asked_every: Tokens between questions on the way [tokens].
        with_model: Whether the model reads and answers. false: only what is kept and what is found, which the encoder
            alone decides: seconds a document, no perplexity, no answers; policies by attention are left out.
        seed: Of bootstrap intervals.
    """

    name = "eviction"
    reported = ("seed",)
    keys = ("corpus", "document", "text", "policy", "capacity", "what", "place")
    whole = ("corpus", "document", "text")

    def __init__(
        self,
        corpora: dict[str, str | dict[str, Any]] | None = None,
        length: int = 65536,
        capacities: list[int] = [4096, 8192, 16384],  # noqa: B006  (never changed; shown)
        policies: dict[str, dict[str, Any]] = POLICIES,
        documents: int = 3,
        windows: int = 6,
        facts: int = 4,
        fact_kind: FactKind = "key_value",
        asked_every: int = 2048,
        with_model: bool = True,
        seed: int = 0,
    ) -> None:
        for key, value in (("documents", documents), ("windows", windows), ("asked_every", asked_every)):
            require(value >= 1, f"evaluation.{key}", value, "1 or more", "raise it")
        require(facts >= 0, "evaluation.facts", facts, "0 or more", "raise it")
        require_choice("evaluation.fact_kind", fact_kind, FactKind)
        require(bool(capacities), "evaluation.capacities", capacities, "at least one", "name one")
        require(bool(policies), "evaluation.policies", policies, "at least one", "name one")
        taken = [name for name in policies if name in (OFF, EVERYTHING) or not isinstance(name, str)]
        require(not taken, "evaluation.policies", taken, "names of their own, as text", "choose others")
        check_corpora(corpora)
        self.corpora, self.length, self.capacities = corpora, length, sorted(set(capacities))
        self.policies, self.documents, self.windows = policies, documents, windows
        self.facts, self.fact_kind, self.asked_every = facts, fact_kind, asked_every
        self.with_model, self.seed = with_model, seed

    @property
    def reads_data(self) -> bool:
        """Whether the documents of the data group are used."""
        return self.corpora is None

    # ---- before anything is measured ----------------------------------------------------------------------

    def prepare(self, subject: Subject) -> None:
        """Check policies and capacities, and find the documents."""
        self._check(subject)
        self._everything = subject.retrieval({"index": "Flat", **({} if self.with_model else AS_NUMBERS)})
        ok = self.with_model or not self._everything.retriever.needs_hidden
        allowed = "true for an encoder that needs the model's hidden states"
        require(ok, "evaluation.with_model", False, allowed, "set it so, or choose another memory.retriever.name")
        self._ways = {
            Cell(name, capacity): self._way(subject, name, fields, capacity)
            for name, fields in self.policies.items() if name not in self._left_out(subject)
            for capacity in self.capacities
        }  # fmt: skip
        require(bool(self._ways), "evaluation.policies", self.policies, "one by retrieval, without a model", "add one")
        wanted = (self.documents, self.length, "evaluation.length", self.length)
        self._documents = find_documents(subject, self.corpora, *wanted)
        self.planted = {d.facts["text"]: self._plant(subject, d) for d in self._documents if self.facts}
        window, chunks = subject.data.window, subject.memory.top_k
        self.title = f"{subject.backbone}, {self.length:,} tokens, window {window}, top-k {chunks}"
        self._left = self._left_out(subject)

    @property
    def remarks(self) -> list[str]:
        """Policies that are left out."""
        return [f"Left out, since use by attention takes a model: {', '.join(self._left)}."] if self._left else []

    def _check(self, subject: Subject) -> None:
        """Check sizes against each other."""
        memory, window, chunk = subject.memory, subject.data.window, subject.memory.chunk_size
        least = max(2 * chunk, memory.retrieved * chunk, window)
        ok = all(c % chunk == 0 and least <= c < self.length for c in self.capacities)
        allowed = (
            f"multiples of memory.chunk_size={chunk}, at least {least} for the window and the chunks retrieved, below "
            f"evaluation.length={self.length}: else nothing is evicted"
        )
        require(ok, "evaluation.capacities", self.capacities, allowed, "change them, or the length")
        require(self.length % chunk == 0, "evaluation.length", self.length, f"a multiple of {chunk}", "round it")
        self.ends = self._ends(window, subject.data.stride)
        allowed = "a second half of at least one window"
        require(bool(self.ends), "evaluation.length", self.length, allowed, "raise it, or lower --data.window")
        for field, value in (("granularity", "window"), ("query", "previous")):
            found = getattr(memory, field)
            require(found == value, f"memory.{field}", found, f"{value} for this evaluation", "set it so")

    def _left_out(self, subject: Subject) -> list[str]:
        """Policies for which the model would have to read."""
        attention = [n for n, fields in self.policies.items() if fields.get("use", subject.memory.use) == "attention"]
        return [] if self.with_model else attention

    def _ends(self, window: int, stride: int) -> list[int]:
        """Where the windows end that are scored."""
        ends = [offset + window for offset in window_offsets(self.length, window, stride)]
        late = [end for end in ends if end - stride >= self.length // 2 and end <= self.length]
        if not late:
            return []
        chosen = np.linspace(0, len(late) - 1, self.windows).round().astype(int)
        return [late[number] for number in np.unique(chosen)]

    def _way(self, subject: Subject, name: str, fields: dict[str, Any], capacity: int) -> Retrieval:
        key = f"evaluation.policies.{name}"
        other = sorted({*fields} - {*VARIED})
        require(not other, key, other, ", ".join(VARIED), "set it for all: --memory.*")
        policy = fields.get("policy", subject.memory.policy)
        require(policy != "none", key, policy, "a policy that evicts: what keeps everything is there", "leave it out")
        # Arguments of the memory group's policy are not those of one that a row names.
        own: dict[str, Any] = {"policy_args": {}} if "policy" in fields else {}
        retrieval = subject.retrieval({**own, **fields, **AS_NUMBERS, "index": "Flat", "capacity": capacity}, key)
        retrieval.new_bank(1)  # a policy that is not there, or not its arguments, is told now
        return retrieval

    def _plant(self, subject: Subject, document: ScoredDocument) -> tuple[Probe, list[Any]]:
        """The document with its facts, and those."""
        text, seed = document.tokens[: self.length], document.facts["text"]
        given = (BETWEEN, text, seed, subject.tokenizer, "evaluation.facts")
        tokens, facts = plant_facts(self.fact_kind, self.facts, *given)
        spans = tuple(fact.planted for fact in facts)
        return Probe(tokens, spans[0], spans, len(tokens), len(tokens)), facts

    @property
    def _cells(self) -> list[Cell]:
        return [*([Cell(OFF, 0)] if self.with_model else []), Cell(EVERYTHING, 0), *self._ways]

    def _window_keys(self, document: ScoredDocument, cell: Cell) -> list[Measurement]:
        replayed = cell in self._ways
        what = [("window", end) for end in self.ends] if self.with_model or replayed else []
        what += [("churn", 0)] if replayed else []
        return [_key(document, cell, *each) for each in what]

    def _fact_keys(self, document: ScoredDocument, cell: Cell) -> list[Measurement]:
        """Nothing is counted, whatever is asked, where there is nothing to be evicted."""
        asked = (SILENT, ASKED) if cell in self._ways else (SILENT,)
        return [_key(document, cell, what, number) for what in asked for number in range(self.facts)]

    def planned(self) -> list[Measurement]:
        """Of all documents and cells, the windows, the facts, and what was evicted."""
        every = [(document, cell) for document in self._documents for cell in self._cells]
        return [key for each in every for key in (*self._window_keys(*each), *self._fact_keys(*each))]

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Measurement]:
        """One document after the other: read once, then cell by cell."""
        todo = [(d, self._missing(d, record, self._window_keys), self._missing(d, record, self._fact_keys))
                for d in self._documents]  # fmt: skip
        todo = [each for each in todo if each[1] or each[2]]
        work = len(self.ends) * subject.data.window
        subject.progress.begin(sum(self.length + len(cells) * work for _, cells, _ in todo), self.name)
        for document, cells, asked in todo:
            text, number = document.tokens[: self.length], int(document.facts["text"], 16)
            bank = self._read(subject, text, number)
            scorer = WindowsOfOne(subject, text, number, self.with_model)
            for cell in cells:
                yield from self._windows(subject, document, cell, bank, scorer)
                subject.progress.advance(work)
            if asked:
                with self._with_facts(subject, document, bank) as questions:
                    for cell in asked:
                        yield from self._asked(document, cell, questions)

    def _missing(
        self, document: ScoredDocument, record: Record, keys: Callable[[ScoredDocument, Cell], list[Measurement]]
    ) -> list[Cell]:
        """Cells that are not in the record yet."""
        return [cell for cell in self._cells if any(key not in record for key in keys(document, cell))]

    def _read(self, subject: Subject, tokens: np.ndarray, document: int) -> BankView:
        """A bank that keeps everything."""
        if not self.with_model:
            return embedded(subject, self._everything, tokens, document)
        return read_documents(subject, [self._everything], [tokens], subject.data.window)[0]

    @contextmanager
    def _with_facts(self, subject: Subject, document: ScoredDocument, bank: BankView) -> Iterator[Questions]:
        """Questions about the document's facts, which are in the bank meanwhile."""
        probe, facts = self.planted[document.facts["text"]]
        text, number = document.tokens[: self.length], int(document.facts["text"], 16)
        about = (probe.tokens, facts, number, self.asked_every, self.with_model)
        if not self.with_model:
            yield Questions(subject, embedded(subject, self._everything, probe.tokens, number), *about)
            return
        with planted_bank(subject, self._everything, bank, probe, text, subject.data.window):
            yield Questions(subject, bank, *about)

    def _windows(
        self, subject: Subject, document: ScoredDocument, cell: Cell, bank: BankView, scorer: "WindowsOfOne"
    ) -> Iterator[Measurement]:
        if cell not in self._ways:
            for end in self.ends if self.with_model else ():
                batch = scorer.batch(end)
                memory = None if cell.policy == OFF else self._everything.retrieve(bank, batch, count=False)
                yield {**_key(document, cell, "window", end), **scorer.score(end, memory)}
            return
        replay = Replay(subject, self._ways[cell], bank, scorer.tokens, scorer.document)
        for batch in replay.batches():
            memory = replay.retrieve(batch)
            end = int(batch["offset"]) + subject.data.window
            if end in self.ends:
                best = self._everything.choose(bank, scorer.batch(end))[1].flatten()
                places = bank.entries(0).positions[best[best >= 0]]
                there = {"wanted": len(places), "there": int(np.isin(places, replay.bank.entries(0).positions).sum())}
                yield {**_key(document, cell, "window", end), **scorer.score(end, memory), **there}
            replay.store(batch, memory)
        held = replay.bank.entries(0)
        churn = {"evictions": replay.evictions, "used": replay.used, "entries": len(held)}
        yield {**_key(document, cell, "churn", 0), **churn, "reach": self.length - int(held.positions.min())}

    def _asked(self, document: ScoredDocument, cell: Cell, questions: Questions) -> Iterator[Measurement]:
        if cell.policy == OFF:
            found = {SILENT: questions.without_memory()}
        elif cell.policy == EVERYTHING:
            found = {SILENT: questions.against_everything(self._everything)}
        else:
            way = self._ways[cell]
            found = {w: questions.replayed(questions.replay(way), on_the_way=w == ASKED) for w in (SILENT, ASKED)}
        for what, measured in found.items():
            yield from ({**_key(document, cell, what, n), **facts} for n, facts in enumerate(measured))

    def report(self, measurements: list[Measurement]) -> Report:
        """Tables and figures."""
        return report_eviction(self.title, list(self.policies), self.capacities, measurements, self.seed)


def _key(document: ScoredDocument, cell: Cell, what: str, place: int) -> Measurement:
    return {**document.facts, **cell._asdict(), "what": what, "place": place}
