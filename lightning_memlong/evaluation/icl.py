"""In-context learning (paper, section 4): demonstrations in the context, and more of them in memory.

Legend: N demonstrations, n entries, C tokens of an entry, B examples asked at once, k entries retrieved.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.demonstrations import Shots, demonstration_text, read_demonstrations
from lightning_memlong.evaluation.icl_report import report_icl
from lightning_memlong.evaluation.labels import label_tokens, score_labels
from lightning_memlong.evaluation.record import Measurement, Record
from lightning_memlong.evaluation.tasks import TASKS, Example, balanced_sample, load_task
from lightning_memlong.retrieval import embed_texts, retrieve_for, seed_of

HUB: dict[str, str | None] = dict.fromkeys(TASKS)


@dataclass
class TaskSample:
    """A task with the examples sample for one seed."""

    task: str
    seed: int
    context: list[Example]
    memory: list[Example]
    asked: list[Example]
    numbers: list[int]
    """Which of the task's these are: seeds may ask the same again."""


class InContextLearning(Evaluation):
    """Accuracy of the label word a model finds most likely, given demonstrations in context and in memory.

    Each demonstration in memory is one entry of the bank (more, if it is longer than ``memory.chunk_size``), read in
    windows of ``window`` tokens with the demonstrations before it; an example retrieves ``memory.top_k`` of them by its
    text, which is known when its label is asked for: ``memory.query`` and the like have no part in it.

    Args:
        tasks: Name -> folder with its files, or null for the hub. Names: SST-2, MR, Subj, SST-5, MPQA.
        context: Numbers of demonstrations in the context [demonstrations].
        memory: Numbers of demonstrations in memory; 0 is memory off [demonstrations].
        selections: How entries are chosen: similarity, and the control random.
        memory_context: The numbers of ``context`` that are combined with memory; null: all [demonstrations].
        examples: Examples asked for each seed [examples].
        seeds: Draws of demonstrations and examples.
        window: Tokens of demonstrations read at once into memory [tokens].
        batch_size: Examples asked at once [examples].
    """

    name = "icl"
    keys = ("task", "seed", "context", "memory", "selection")
    whole = ("task", "seed")

    def __init__(
        self,
        tasks: dict[str, str | None] = HUB,
        context: list[int] = [0, 4, 20],  # noqa: B006  (never changed; shown as the default by --help)
        memory: list[int] = [0, 200],  # noqa: B006  (likewise)
        selections: list[str] = ["similarity", "random"],  # noqa: B006  (likewise)
        memory_context: list[int] | None = None,
        examples: int = 200,
        seeds: int = 3,
        window: int = 1024,
        batch_size: int = 8,
    ) -> None:
        require(bool(tasks), "evaluation.tasks", tasks, f"at least one of {', '.join(TASKS)}", "name one")
        for name in tasks:
            require_choice("evaluation.tasks", name, TASKS)
        for key, value in (("examples", examples), ("seeds", seeds), ("batch_size", batch_size), ("window", window)):
            require(value >= 1, f"evaluation.{key}", value, "1 or more", "raise it")
        for key, values in (("context", context), ("memory", memory)):
            require(bool(values) and min(values) >= 0, f"evaluation.{key}", values, "0 or more each", "raise them")
        for name in selections:
            require_choice("evaluation.selections", name, ("similarity", "random"))
        self.tasks, self.context, self.memory, self.selections = tasks, context, memory, selections
        self.memory_context = context if memory_context is None else memory_context
        ok = not any(memory) or bool({*self.memory_context} & {*context})
        allowed = f"at least one of evaluation.context: {context}"
        require(ok, "evaluation.memory_context", memory_context, allowed, "add it there, or leave memory_context out")
        self.examples, self.seeds, self.window, self.batch_size = examples, seeds, window, batch_size

    # ---- before anything is measured ----------------------------------------------------------------------

    def prepare(self, subject: Subject) -> None:
        """Read the tasks and check their label words."""
        self._labels = {name: label_tokens(name, subject.tokenizer) for name in self.tasks}
        loaded = {name: load_task(name, path, f"evaluation.tasks.{name}") for name, path in self.tasks.items()}
        self.samples = [
            self.draw_sample(name, seed, *loaded[name]) for name in self.tasks for seed in range(self.seeds)
        ]
        self.title = f"{subject.backbone}, top-k {subject.memory.top_k}, {subject.memory.retriever.name}"

    def draw_sample(self, name: str, seed: int, train: list[Example], asked: list[Example]) -> TaskSample:
        """Draw the demonstrations and examples of one seed."""
        mixer = random.Random(f"{name} {seed}")
        labels = len(TASKS[name].words)
        most = max(self.context) + max(self.memory)
        allowed = f"at most the {len(train)} training examples of {name}, in context and memory together"
        require(most <= len(train), "evaluation.memory", self.memory, allowed, "lower it")
        shown = balanced_sample(train, max(self.context), labels, mixer)
        left = [e for e in train if e not in set(shown)]
        kept = balanced_sample(left, max(self.memory), labels, mixer)
        numbers = mixer.sample(range(len(asked)), min(self.examples, len(asked)))
        return TaskSample(name, seed, shown, kept, [asked[number] for number in numbers], numbers)

    def shots(self) -> list[Shots]:
        """All ways of giving demonstrations that are compared."""
        off = [Shots(context, 0, "off") for context in self.context]
        return off + [
            Shots(context, memory, selection)
            for memory in self.memory if memory for selection in self.selections
            for context in self.context if context in self.memory_context
        ]  # fmt: skip

    def planned(self) -> list[Measurement]:
        """All draws, each in all ways."""
        return [_key(sample, shots) for sample in self.samples for shots in self.shots()]

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Measurement]:
        """One draw after the other, each in all ways."""
        todo = [
            (sample, {s: _prompt_tokens(subject, sample, s) for s in self.shots() if _key(sample, s) not in record})
            for sample in self.samples
        ]
        subject.progress.begin(sum(tokens for _, ways in todo for tokens in ways.values()), self.name)
        for sample, ways in todo:
            banks = {
                n: read_demonstrations(subject, sample.task, sample.memory[:n], self.window)
                for n in {s.memory for s in ways} - {0}
            }
            for shots, tokens in ways.items():
                scores = self._scores(subject, sample, shots, banks.get(shots.memory))
                subject.progress.advance(tokens)
                yield _key(sample, shots) | _judge(scores, sample, len(TASKS[sample.task].words))

    def _scores(self, subject: Subject, sample: TaskSample, shots: Shots, bank: BankView | None) -> Tensor:
        """Log-likelihood of each label word (examples, labels), float32."""
        before = "".join(demonstration_text(sample.task, e) for e in sample.context[: shots.context])
        scores = []
        for at in range(0, len(sample.asked), self.batch_size):
            asked = sample.asked[at : at + self.batch_size]
            prompts = [before + TASKS[sample.task].template.format(e.text) for e in asked]
            memory = None if bank is None else self._retrieved(subject, bank, shots, sample, asked, at)
            scores.append(score_labels(subject, prompts, self._labels[sample.task], memory))
        return torch.cat(scores)

    def _retrieved(
        self, subject: Subject, bank: BankView, shots: Shots, sample: TaskSample, asked: Sequence[Example], at: int
    ) -> Retrieved | None:
        """What each example retrieves, a row each; by similarity, with its text.

        The one place of this file that knows selections by name.
        """
        retrieval, chunks = subject.retrieval(), subject.memory.retrieved
        if shots.selection == "random":
            chosen = [bank.random(chunks, [seed_of(sample.seed, at + i)])[0] for i in range(len(asked))]
            found = retrieval.gather(bank, torch.stack(chosen)[None], count=False)
            if found is not None:
                found.asked = True  # as those that are chosen by their text: a control differs in nothing else
            return found
        by_prompt = retrieval.retriever.needs_hidden
        texts = [TASKS[sample.task].template.format(e.text) if by_prompt else e.text for e in asked]
        asking = embed_texts(retrieval, texts, subject.device, subject.hidden_states)
        return retrieve_for(retrieval, bank, asking[:, None].unbind())

    def report(self, measurements: list[Measurement]) -> Report:
        """Tables and figures."""
        return report_icl(self.title, self.tasks, measurements)


def _prompt_tokens(subject: Subject, sample: TaskSample, shots: Shots) -> int:
    """Tokens of all prompts."""
    shown = "".join(demonstration_text(sample.task, e) for e in sample.context[: shots.context])
    asked = [TASKS[sample.task].template.format(e.text) for e in sample.asked]
    counts = [len(ids) for ids in subject.tokenizer([shown, *asked], add_special_tokens=False)["input_ids"]]
    return counts[0] * len(asked) + sum(counts[1:])


def _key(sample: TaskSample, shots: Shots) -> Measurement:
    return {"task": sample.task, "seed": sample.seed, **shots._asdict()}


def _judge(scores: Tensor, sample: TaskSample, labels: int) -> Measurement:
    """Which examples were right, plainly and calibrated, as strings of 0 and 1, and how many the largest class has."""
    truth = torch.tensor([e.label for e in sample.asked])
    log_p = scores.log_softmax(dim=1)
    # Batch calibration (Zhou et al., arXiv 2309.17249): the mean over the examples asked is the bias of the prompt.
    calibrated = log_p - log_p.mean(dim=0, keepdim=True)
    right = [(s.argmax(dim=1) == truth).int().tolist() for s in (log_p, calibrated)]
    most = int(np.bincount(truth.numpy(), minlength=labels).max())
    hits = {"hits": "".join(map(str, right[0])), "calibrated": "".join(map(str, right[1]))}
    return {**hits, "majority": most, "asked": sample.numbers}
