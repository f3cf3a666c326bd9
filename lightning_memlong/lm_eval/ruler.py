"""RULER (arXiv 2404.06654) through lm-eval's own tasks: documents, prompts and scores are theirs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lightning_memlong.bank import BankView
from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation import Evaluation, Measurement, Record, Report, Subject
from lightning_memlong.generation import LongContext
from lightning_memlong.lm_eval.answering import Answers, chat_text, cut_off, prompted, writing_options
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
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.text import tokenise

OFF = "off"
SETTINGS: dict[str, dict[str, Any]] = {"similarity": {}, "random": {"selection": "random"}}
NEED_NOTHING = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]
"""Tasks made of rules and word lists alone."""
Way = Callable[[list[int], str, BankView | None, int], AbstractContextManager[Answers]]
"""How a setting answers, given the prompt's last tokens, the question, the bank with what is before them, its row.

A model of another kind would be one more; its bank is None."""


@dataclass(frozen=True)
class Asked:
    """A document as tokens, and what is scored after it."""

    document: RulerDocument
    tokens: np.ndarray
    """(T,) of the prompt."""
    cut: int
    """How many of them are read into a bank; the others are local."""
    answer: list[int]
    wrong: list[int]
    """The answer to another document."""
    needles: list[tuple[int, int]]
    """Where what says the answers begins and ends, of what is in the bank [tokens]."""


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
        haystack: A text file in which the needles of niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue and
            niah_multiquery are planted; null: Paul Graham's essays, from the hub.
        squad: A file of SQuAD's development set for qa_1 (dev-v2.0.json); null: from its address.
        hotpotqa: A file of HotpotQA's for qa_2 (hotpot_dev_distractor_v1.json); null: from its address.
        chat: Whether prompts are written by the backbone's chat template.
        seed: Of the documents.
    """

    name = "ruler"
    keys = ("task", "length", "sample", "setting")

    def __init__(
        self,
        tasks: list[str] = NEED_NOTHING,
        lengths: list[int] = [4096, 16384],  # noqa: B006  (never changed; shown as the default by --help)
        samples: int = 10,
        settings: dict[str, dict[str, Any]] = SETTINGS,
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
        taken = [name for name in settings if name == OFF or not isinstance(name, str)]  # unquoted, YAML reads off
        require(not taken, "evaluation.settings", taken, "names of their own, as text", "choose others")
        self.tasks, self.lengths, self.samples = list(dict.fromkeys(tasks)), sorted(set(lengths)), samples
        self.settings, self.haystack, self.squad, self.hotpotqa = settings, haystack, squad, hotpotqa
        self.chat, self.seed = chat, seed

    # ---- before anything is measured ----------------------------------------------------------------------

    def prepare(self, subject: Subject) -> None:
        """Make the documents."""
        require_tokens(subject.tokenizer, subject.backbone)
        self._ways, self._retrievals = self._settings(subject)
        window = _long_context(subject, subject.retrieval()).window(subject.data.window)
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

    def _settings(self, subject: Subject) -> tuple[dict[str, Way], dict[str, Retrieval]]:
        """What answers, by name, and the settings of those that retrieve."""
        retrievals = {}
        for name, options in self.settings.items():
            retrievals[name] = subject.row_retrieval(options, f"evaluation.settings.{name}")
        first = next(iter(retrievals.values()), subject.retrieval())
        ways: dict[str, Way] = {OFF: partial(_without_memory, _long_context(subject, first), subject.data.window)}
        for name, retrieval in retrievals.items():
            ways[name] = partial(_with_memory, _long_context(subject, retrieval), subject.data.window)
        return ways, retrievals

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
            found.append(Asked(document, tokens, cut, answers[number], other, places))
        return found

    def planned(self) -> list[Measurement]:
        """All documents, each with every setting."""
        return [_key(a.document, name) for group in self._groups.values() for a in group for name in self._ways]

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Measurement]:
        """One task and length after the other, each document with every setting."""
        todo = {
            key: [a for a in group if any(_key(a.document, name) not in record for name in self._ways)]
            for key, group in self._groups.items()
        }
        window = subject.data.window
        work = [a.cut + len(self._ways) * window for group in todo.values() for a in group]
        subject.progress.begin(sum(work), self.name)
        for group in todo.values():
            # By their tokens: those that begin alike come one after the other.
            group = sorted(group, key=lambda a: a.tokens.astype(">u4").tobytes())
            for asked, row, banks in self._read(subject, group):
                for name, way in self._ways.items():
                    if _key(asked.document, name) not in record:
                        yield self._measure(asked, name, way, banks.get(name), row)
                    subject.progress.advance(window)

    def _read(self, subject: Subject, group: Sequence[Asked]) -> Iterator[tuple[Asked, int, Mapping[str, BankView]]]:
        """Documents, each with its row of the banks of all settings; none where there is nothing to read."""
        rows = min(subject.data.batch_size, len(group))
        longest = max((a.cut for a in group), default=0)
        if not self._retrievals or longest == 0:
            yield from ((asked, 0, {}) for asked in group)
            return
        reading = SharedReading(subject, list(self._retrievals.values()), subject.data.window, rows, longest)
        for at in range(0, len(group), rows):
            asked = group[at : at + rows]
            banks = reading.read([a.tokens[: a.cut] for a in asked])
            for row, one in enumerate(asked):
                yield one, row, dict(zip(self._retrievals, banks, strict=True))

    def _measure(self, asked: Asked, name: str, way: Way, bank: BankView | None, row: int) -> Measurement:
        document = asked.document
        stops, options = writing_options(document.options)
        with way(asked.tokens[asked.cut :].tolist(), document.question, bank, row) as answers:
            losses, likeliest = answers.score(asked.answer)
            wrong, _ = answers.score(asked.wrong)
            places = answers.retrieved()
            written = answers.write(stops, **options)
        found = _key(document, name) | {"prompt": len(asked.tokens), "memory": asked.cut}
        found |= {"score": document.score(written), "answers": len(document.answers)}
        found |= {"tokens": len(asked.answer), "right_tokens": int(likeliest.sum()), "nll": float(losses.sum())}
        # By a token, as the two may have different numbers of them.
        found["beats_wrong"] = int(float(losses.mean()) < float(wrong.mean()))
        if name != OFF and asked.needles:
            hits = [any(start < b and a < end for a, b in places) for start, end in asked.needles]
            found |= {"needles": len(hits), "retrieved": sum(hits)}
        return found | {"written": written[:200]}

    def report(self, measurements: list[Measurement]) -> Report:
        """Tables and figures."""
        style = [task for task in self.tasks if task in ESSAYS and self.haystack is not None]
        return report_ruler(self.title, self.tasks, self.lengths, style, self._stand_in, measurements)


def _long_context(subject: Subject, retrieval: Retrieval) -> LongContext:
    return LongContext(subject.model, retrieval.config, subject.tokenizer, retrieval.retriever, subject.autocast)


def _without_memory(
    long_context: LongContext, window: int, local: list[int], question: str, bank: BankView | None, row: int
) -> AbstractContextManager[Answers]:
    return prompted(long_context, None, local, question, window)


def _with_memory(
    long_context: LongContext, window: int, local: list[int], question: str, bank: BankView | None, row: int
) -> AbstractContextManager[Answers]:
    return prompted(long_context, bank, local, question, window, row)


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
