"""RULER (arXiv 2404.06654) through lm-eval's own tasks: documents, prompts and scores are theirs."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_memlong.bank import BankView
from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation import Evaluation, Measurement, Record, Report, Subject
from lightning_memlong.evaluation.alternatives import TITLES, AlternativeKind
from lightning_memlong.evaluation.cost import now
from lightning_memlong.lm_eval.answering import chat_text, cut_off, writing_options
from lightning_memlong.lm_eval.lm_eval_private import require_tokens, splitter_is_there
from lightning_memlong.lm_eval.ruler_reading import SharedReading
from lightning_memlong.lm_eval.ruler_report import report_ruler
from lightning_memlong.lm_eval.ruler_tasks import (
    ESSAYS,
    SHORTEST,
    TASKS,
    RulerDocument,
    RulerSource,
    make_documents,
    require_files,
)
from lightning_memlong.lm_eval.ruler_ways import OFF, Asked, Way, long_context_of, open_ways
from lightning_memlong.text import tokenise

SETTINGS: dict[str, dict[str, Any]] = {"similarity": {}, "random": {"selection": "random"}}
NEED_NOTHING = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]
"""Tasks made of rules and word lists alone."""


class Ruler(Evaluation):
    """RULER's scores, and for models too small to answer, how likely the right answers are to them.

    The last ``data.window`` tokens of a prompt are local (less room for the answer), the rest is read into a bank, once
    for all settings. The question retrieves by its own text, the prompt's last line. Answers are written greedily as
    lm-eval asks, and scored by its scorer.

    Args:
        tasks: niah_single_1, niah_single_2, niah_single_3, niah_multikey_1, niah_multikey_2, niah_multikey_3,
            niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2.
        lengths: Tokens of the documents with their answers, by the backbone's tokenizer [tokens].
        samples: Documents of each task and length [documents].
        settings: Name -> fields of the memory group that differ; {} is the memory as configured. Every table also has
            memory off.
        alternatives: What else could be done on the same weights, a row each: trained_window, yarn, dynamic_ntk, sinks,
            prompt, as in ``PerplexityGrid``; the prompt's chunks are those that the question retrieves.
        haystack: A text file in which the needles of niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue and
            niah_multiquery are planted; null: Paul Graham's essays, from the hub.
        squad: A file of SQuAD's development set for qa_1 (dev-v2.0.json); null: from its address.
        hotpotqa: A file of HotpotQA's for qa_2 (hotpot_dev_distractor_v1.json); null: from its address.
        chat: Whether prompts are written by the backbone's chat template.
        seed: Of the documents.
    """

    name = "ruler"
    keys = ("task", "length", "sample", "setting")
    whole = ("task", "length", "sample")

    def __init__(
        self,
        tasks: list[str] = NEED_NOTHING,
        lengths: list[int] = [4096, 16384],  # noqa: B006  (never changed; shown as the default by --help)
        samples: int = 10,
        settings: dict[str, dict[str, Any]] = SETTINGS,
        alternatives: list[str] = [],  # noqa: B006  (likewise)
        haystack: str | None = None,
        squad: str | None = None,
        hotpotqa: str | None = None,
        chat: bool = False,
        seed: int = 0,
    ) -> None:
        require(bool(tasks), "evaluation.tasks", tasks, f"at least one of {', '.join(TASKS)}", "name one")
        for task in tasks:
            require_choice("evaluation.tasks", task, TASKS)
        ok = bool(lengths) and min(lengths) >= SHORTEST
        require(ok, "evaluation.lengths", lengths, f"{SHORTEST} or more tokens each", "raise them")
        require(samples >= 1, "evaluation.samples", samples, "1 or more", "raise it")
        require(0 <= seed < 2**32, "evaluation.seed", seed, "0 to 4294967295", "choose another")
        for kind in alternatives:
            require_choice("evaluation.alternatives", kind, AlternativeKind)
        # Unquoted, YAML reads off as a truth value.
        taken = [name for name in settings if name in (OFF, *TITLES) or not isinstance(name, str)]
        require(not taken, "evaluation.settings", taken, "names of their own, as text", "choose others")
        self.tasks, self.lengths, self.samples = list(dict.fromkeys(tasks)), sorted(set(lengths)), samples
        self.settings, self.alternatives = settings, alternatives
        self.haystack, self.squad, self.hotpotqa = haystack, squad, hotpotqa
        self.chat, self.seed = chat, seed

    # ---- before anything is measured ----------------------------------------------------------------------

    def prepare(self, subject: Subject) -> None:
        """Make the documents."""
        require_tokens(subject.tokenizer, subject.backbone)
        self._ways, self._retrievals = open_ways(subject, self.settings, self.alternatives, max(self.lengths))
        window = long_context_of(subject, subject.retrieval()).window(subject.data.window)
        require(
            max(self.lengths) > window, "data.window", window, f"less than the longest of {self.lengths}", "lower it"
        )
        template = partial(chat_text, subject.tokenizer) if self.chat else None
        source = RulerSource(subject.tokenizer, self.seed, self.haystack, self.squad, self.hotpotqa, template)
        require_files(source, self.tasks, max(self.lengths))
        if template is not None:
            template([{"role": "user", "content": "x"}])
        self._groups = {}
        subject.progress.begin(sum(self.lengths) * len(self.tasks) * self.samples, "making documents")
        for length in self.lengths:
            for task in self.tasks:
                self._groups[task, length] = self._group(source, task, length, window, subject.memory.chunk_size)
                subject.progress.advance(length * self.samples)
        self.title = f"{subject.backbone}, window {window}, top-k {subject.memory.top_k}"
        self._stand_in = not splitter_is_there() and any(task in ESSAYS for task in self.tasks)

    def _group(self, source: RulerSource, task: str, length: int, window: int, chunk: int) -> list[Asked]:
        """The documents of a task and length, as tokens; one more is made, whose answer is wrong for the last."""
        documents = make_documents(source, task, length, self.samples + 1)
        answers = [tokenise(source.tokenizer, [d.answer])[0].tolist() for d in documents]
        unknown = source.tokenizer.unk_token_id
        ok = all(answers) and not any(unknown is not None and unknown in tokens for tokens in answers)
        allowed = f"one that knows the words and numbers of {task}"
        require(ok, "model.backbone", "its tokenizer", allowed, "choose another, or leave the task out")
        room = max(max(map(len, answers)), *(writing_options(d.options)[1]["max_new_tokens"] for d in documents))
        found = []
        for number, document in enumerate(documents[:-1]):
            tokens = tokenise(source.tokenizer, [document.prompt])[0]
            question = len(tokenise(source.tokenizer, [document.question])[0])
            allowed = f"more than the {question + room + chunk} tokens of a question, an answer and a chunk"
            require(window > question + room + chunk, "data.window", window, allowed, "raise it")
            cut = cut_off(len(tokens), window - room, chunk)
            other = _other(documents, answers, number)
            places = _places(source.tokenizer, document, cut)
            found.append(Asked(document, tokens, cut, room, answers[number], other, places))
        return found

    def planned(self) -> list[Measurement]:
        """All documents, each with every way."""
        return [key for group in self._groups.values() for asked in group for key in self._keys_of(asked)]

    def _keys_of(self, asked: Asked) -> list[Measurement]:
        return [_key(asked.document, name) for name in self._ways_at(asked.document.length)]

    def _ways_at(self, length: int) -> dict[str, Way]:
        return {name: way for name, way in self._ways.items() if way.takes(length)}

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Measurement]:
        """One task and length after the other, each document in every way."""
        todo = {key: [a for a in group if self._left(a, record)] for key, group in self._groups.items()}
        work = [a.cut + sum(self._work(a).values()) for group in todo.values() for a in group]
        subject.progress.begin(sum(work), self.name)
        for group in todo.values():
            # By their tokens: those that begin alike come one after the other.
            group = sorted(group, key=lambda a: a.tokens.astype(">u4").tobytes())
            for asked, row, banks, seconds in self._read(subject, group, record):
                for name, tokens in self._work(asked).items():
                    if _key(asked.document, name) not in record:
                        way = self._ways[name]
                        before = seconds if way.bank else 0.0
                        yield self._measure(subject, asked, name, banks.get(way.bank or ""), row, before)
                    subject.progress.advance(tokens)

    def _left(self, asked: Asked, record: Record) -> list[str]:
        """Ways in which a document has not been measured."""
        return [name for name in self._ways_at(asked.document.length) if _key(asked.document, name) not in record]

    def _work(self, asked: Asked) -> dict[str, int]:
        """The ways of a document, and what each of them reads, but for what it reads into a bank [tokens]."""
        local = len(asked.tokens) - asked.cut
        return {
            name: local if way.bank or name == OFF else len(asked.tokens)
            for name, way in self._ways_at(asked.document.length).items()
        }

    def _read(
        self, subject: Subject, group: Sequence[Asked], record: Record
    ) -> Iterator[tuple[Asked, int, Mapping[str, BankView], float]]:
        """Documents, each with its row of the banks of all settings, and how long it takes to read [s].

        Without banks where nothing is to be read, or by no way that is left. Beginnings that documents share are read
        once, and cost each the same.
        """
        wanted = [a.cut > 0 and any(self._ways[name].bank for name in self._left(a, record)) for a in group]
        yield from ((asked, 0, {}, 0.0) for asked, needs in zip(group, wanted, strict=True) if not needs)
        group = [asked for asked, needs in zip(group, wanted, strict=True) if needs]
        if not group:
            return
        rows, longest = min(subject.data.batch_size, len(group)), max(a.cut for a in group)
        reading = SharedReading(subject, list(self._retrievals.values()), subject.data.window, rows, longest)
        of_token = 0.0
        for at in range(0, len(group), rows):
            asked = group[at : at + rows]
            start = now(subject.device)
            banks = reading.read([a.tokens[: a.cut] for a in asked])
            if reading.tokens:
                of_token = (now(subject.device) - start) / reading.tokens
            for row, one in enumerate(asked):
                yield one, row, dict(zip(self._retrievals, banks, strict=True)), of_token * one.cut

    def _measure(
        self, subject: Subject, asked: Asked, name: str, bank: BankView | None, row: int, before: float
    ) -> Measurement:
        document, way = asked.document, self._ways[name]
        stops, options = writing_options(document.options)
        start = now(subject.device)
        with way.answers(asked, bank, row) as answers:
            read = now(subject.device) - start
            losses, likeliest = answers.score(asked.answer)
            wrong, _ = answers.score(asked.wrong)
            written = answers.write(stops, **options)
            places = answers.retrieved()
        found = _key(document, name) | {"prompt": len(asked.tokens), "memory": asked.cut}
        found |= {"score": document.score(written), "answers": len(document.answers)}
        found |= {"tokens": len(asked.answer), "right_tokens": int(likeliest.sum()), "nll": float(losses.sum())}
        # By a token, as the two may have different numbers of them.
        found["beats_wrong"] = int(float(losses.mean()) < float(wrong.mean()))
        if way.bank and asked.needles:
            hits = [any(start < b and a < end for a, b in places) for start, end in asked.needles]
            found |= {"needles": len(hits), "retrieved": sum(hits)}
        found |= {"seconds": round(before + read, 4), "held": way.held(len(asked.tokens))}
        return found | {"written": written[:200]}

    def report(self, measurements: list[Measurement]) -> Report:
        """Tables and figures."""
        style = [task for task in self.tasks if task in ESSAYS and self.haystack is not None]
        return report_ruler(self.title, self.tasks, self.lengths, style, self._stand_in, measurements)


def _other(documents: Sequence[RulerDocument], answers: Sequence[list[int]], number: int) -> list[int]:
    """The answer of the next document that has another one; its own where there is none, which beats nothing."""
    there = [n for n in (*range(number + 1, len(documents)), *range(number))]
    return next((answers[n] for n in there if answers[n] != answers[number]), answers[number])


def _places(tokenizer: Any, document: RulerDocument, cut: int) -> list[tuple[int, int]]:
    """Where a document's needles begin and end, of those that begin before ``cut`` [tokens]."""
    found = []
    for needle in document.needles:
        at = document.prompt.index(needle)
        before, whole = (document.prompt[:end] for end in (at, at + len(needle)))
        start, end = (len(tokens) for tokens in tokenise(tokenizer, [before, whole]))
        if start < cut:
            found.append((start, end))
    return found


def _key(document: RulerDocument, setting: str) -> Measurement:
    return {"task": document.task, "length": document.length, "sample": document.sample, "setting": setting}
