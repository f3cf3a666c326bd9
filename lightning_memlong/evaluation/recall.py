"""Recall probes: something planted at a depth of a long document is asked for at its end."""

import itertools
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.planted_bank import planted_bank
from lightning_memlong.evaluation.recall_report import report_recall
from lightning_memlong.evaluation.record import Measurement, Record
from lightning_memlong.evaluation.scoring import ScoredSpans, among, read_documents, score_answer, window_batch
from lightning_memlong.retrieval import Retrieval, embed_texts, retrieve_for
from lightning_memlong.text.planting import KINDS, Probe, filler_tokens, plant


class ProbeSpec(NamedTuple):
    """What a probe is made of."""

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
    whole = ("kind", "length", "depth", "sample")

    def __init__(
        self,
        kinds: list[str] = list(KINDS),  # noqa: B006  (shown as the default by --help)
        lengths: list[int] = [1024, 4096, 16384, 65536],  # noqa: B006  (likewise)
        depths: list[float] = [0.0, 0.25, 0.5, 0.75, 1.0],  # noqa: B006  (likewise)
        samples: int = 3,
        filler: str | None = None,
        selections: list[str] = ["similarity", "random"],  # noqa: B006  (likewise)
    ) -> None:
        require(bool(kinds), "evaluation.kinds", kinds, f"at least one of {', '.join(KINDS)}", "name one")
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
        self.filler_tokens = filler_tokens(self.filler, max(self.lengths), subject.tokenizer, "evaluation.filler")
        grid = itertools.product(self.kinds, self.lengths, self.depths, range(self.samples))
        self._specs = [ProbeSpec(*values) for values in grid]
        self.probes = {
            spec: plant(*spec, self.filler_tokens, subject.tokenizer, "evaluation.lengths") for spec in self._specs
        }
        longest = max(len(p.tokens) - p.question for p in self.probes.values())
        allowed = f"more than the {longest} tokens of the longest question and answer"
        require(window > longest, "data.window", window, allowed, "raise it")
        self.title = f"{subject.backbone}, window {window}, top-k {subject.memory.top_k}"

    def planned(self) -> list[Measurement]:
        """All probes, each with memory off and each way of choosing."""
        return [_key(spec, name) for spec in self._specs for name in ("off", *self._ways)]

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Measurement]:
        """One probe after the other, with memory off and with each way of choosing."""
        names = ("off", *self._ways)
        todo = [spec for spec in self._specs if any(_key(spec, n) not in record for n in names)]
        window = subject.data.window
        longest = max((spec.length for spec in todo), default=0)
        passes = len(names) + 1
        subject.progress.begin(longest + len(todo) * passes * window, self.name)
        if not todo:
            return
        first = next(iter(self._ways.values()), subject.retrieval())
        bank = read_documents(subject, [first], [self.filler_tokens[:longest]], window)[0]
        for spec in todo:
            probe = self.probes[spec]
            with planted_bank(subject, first, bank, probe, self.filler_tokens, window):
                yield from self._measure(subject, spec, probe, bank)
            subject.progress.advance(passes * window)

    def _measure(self, subject: Subject, spec: ProbeSpec, probe: Probe, bank: BankView) -> Iterator[Measurement]:
        length, scored = len(probe.tokens), len(probe.tokens) - probe.answer
        spans = ScoredSpans((length,), min(length, subject.data.window), scored, length)
        # Each probe has a random draw of its own. Numbers that were measured depend on how this is spelt.
        document = zlib.crc32(f"Cell({', '.join(f'{k}={v!r}' for k, v in spec._asdict().items())})".encode())
        batch = window_batch(subject, [probe.tokens], spans, [document])
        start = length - spans.local
        yield self._scored(subject, spec, "off", batch, None, probe, start)
        for name, retrieval in self._ways.items():
            yield self._scored(
                subject, spec, name, batch, self._retrieved(subject, retrieval, bank, batch, probe), probe, start
            )

    def _retrieved(
        self, subject: Subject, retrieval: Retrieval, bank: BankView, batch: dict[str, Any], probe: Probe
    ) -> Retrieved | None:
        """What the probe retrieves; by similarity, with the text of its question.

        The one place of this file that knows selections by name.
        """
        if retrieval.config.selection != "similarity":
            return retrieval.retrieve(bank, batch, count=False)
        question = subject.tokenizer.decode(probe.tokens[probe.question : probe.answer])
        asking = embed_texts(retrieval, [question], subject.device, subject.hidden_states)
        return retrieve_for(retrieval, bank, [asking], int(batch["offset"][0]))

    def _scored(
        self,
        subject: Subject,
        spec: ProbeSpec,
        name: str,
        batch: dict[str, Any],
        memory: Retrieved | None,
        probe: Probe,
        start: int,
    ) -> Measurement:
        scored, _ = score_answer(subject, batch, memory, probe.tokens[probe.answer :])
        found: Measurement = {**spec._asdict(), "setting": name, **scored}
        found["local"] = int(probe.planted[0] >= start)
        if memory is not None:
            found["hit"] = int(among(memory, probe.planted, subject.memory.chunk_size))
        return found

    def report(self, measurements: list[Measurement]) -> Report:
        """Tables and figures."""
        return report_recall(self.title, self.kinds, self.lengths, self.depths, measurements)


def _key(spec: ProbeSpec, setting: str) -> Measurement:
    return {**spec._asdict(), "setting": setting}
