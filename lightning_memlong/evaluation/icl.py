"""In-context learning (paper, section 4): demonstrations in the context, and more of them in memory.

Legend: N demonstrations, n entries, C tokens of an entry, B examples asked at once, k entries retrieved.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import BankView
from lightning_memlong.config import require, require_choice
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.icl_report import report
from lightning_memlong.evaluation.labels import label_tokens, score_labels
from lightning_memlong.evaluation.record import Record, Row
from lightning_memlong.evaluation.tasks import TASKS, Example, balanced, load_task
from lightning_memlong.retrieval import Chunks, embed_texts, retrieve_for, seed_of

HUB: dict[str, str | None] = dict.fromkeys(TASKS)


class Cell(NamedTuple):
    """One way of giving demonstrations."""

    context: int
    """Demonstrations in the context."""
    memory: int
    """Demonstrations in memory; 0: memory off."""
    selection: str
    """How entries are chosen."""


@dataclass
class Drawn:
    """A task with the examples of one seed."""

    task: str
    seed: int
    context: list[Example]
    memory: list[Example]
    asked: list[Example]


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
        self.examples, self.seeds, self.window, self.batch_size = examples, seeds, window, batch_size

    # ---- before anything is measured ----------------------------------------------------------------------

    def prepare(self, subject: Subject) -> None:
        """Read the tasks and check their label words."""
        self._labels = {name: label_tokens(name, subject.tokenizer) for name in self.tasks}
        loaded = {name: load_task(name, path, f"evaluation.tasks.{name}") for name, path in self.tasks.items()}
        self._draws = [self._draw(name, seed, *loaded[name]) for name in self.tasks for seed in range(self.seeds)]
        self.title = f"{subject.backbone}, top-k {subject.memory.top_k}, {subject.memory.retriever.name}"

    def _draw(self, name: str, seed: int, train: list[Example], asked: list[Example]) -> Drawn:
        mixer = random.Random(f"{name} {seed}")
        labels = len(TASKS[name].words)
        most = max(self.context) + max(self.memory)
        allowed = f"at most the {len(train)} training examples of {name}, in context and memory together"
        require(most <= len(train), "evaluation.memory", self.memory, allowed, "lower it")
        shown = balanced(train, max(self.context), labels, mixer)
        left = [e for e in train if e not in set(shown)]
        kept = balanced(left, max(self.memory), labels, mixer)
        return Drawn(name, seed, shown, kept, mixer.sample(asked, min(self.examples, len(asked))))

    def cells(self) -> list[Cell]:
        """All ways of giving demonstrations that are compared."""
        off = [Cell(context, 0, "off") for context in self.context]
        return off + [
            Cell(context, memory, selection)
            for memory in self.memory if memory for selection in self.selections
            for context in self.context if context in self.memory_context
        ]  # fmt: skip

    def planned(self) -> list[Row]:
        """All draws, each in all ways."""
        return [_row(drawn, cell) for drawn in self._draws for cell in self.cells()]

    # ---- measuring ----------------------------------------------------------------------------------------

    def run(self, subject: Subject, record: Record) -> Iterator[Row]:
        """One draw after the other, each in all ways."""
        todo = [
            (drawn, {c: _tokens(subject, drawn, c) for c in self.cells() if _row(drawn, c) not in record})
            for drawn in self._draws
        ]
        subject.progress.begin(sum(tokens for _, cells in todo for tokens in cells.values()), self.name)
        for drawn, cells in todo:
            banks = {n: self._read(subject, drawn, n) for n in {c.memory for c in cells} - {0}}
            for cell, tokens in cells.items():
                scores = self._scores(subject, drawn, cell, banks.get(cell.memory))
                subject.progress.advance(tokens)
                yield _row(drawn, cell) | _judge(scores, drawn, len(TASKS[drawn.task].words))

    def _read(self, subject: Subject, drawn: Drawn, count: int) -> BankView:
        """Demonstrations as entries of a bank of one row."""
        texts = [_shown(drawn.task, e) for e in drawn.memory[:count]]
        ids = [subject.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        retrieval, size = subject.retrieval(), subject.memory.chunk_size
        entries = sum(-(-len(i) // size) for i in ids)
        bank = retrieval.new_bank(1, entries * size)
        place = 0
        for group in _windows(ids, self.window):
            # Another demonstration before them: the first token that is read is a sink of attention, and is not kept.
            begun, tokens = ids[group[0] - 1], [t for i in group for t in ids[i]]
            batch = torch.tensor([[*begun, *tokens]], device=subject.device)
            with torch.no_grad(), subject.autocast():
                output = subject.model(batch, logits_to_keep=1)
            starts, lengths, owners = _entries([len(ids[i]) for i in group], size)
            keys, values = (_cut(t[..., len(begun) :, :], starts, lengths, size) for t in (output.keys, output.values))
            if retrieval.retriever.needs_hidden:
                states = _cut(output.memory_hidden[:, len(begun) :], starts, lengths, size)
                hidden = states[0].detach().float().cpu().unflatten(0, (-1, size))
                chunks = Chunks(torch.empty(0), torch.tensor(lengths), lambda _: [], hidden)
                embeddings = retrieval.retriever.embed(chunks)
            else:
                each = retrieval.retriever.encode([drawn.memory[i].text for i in group])
                embeddings = each[torch.tensor(owners)]
            positions = place + torch.tensor(starts)
            bank.insert(keys, values, embeddings[None], torch.tensor(lengths)[None], positions[None])
            place += len(tokens)
        return bank

    def _scores(self, subject: Subject, drawn: Drawn, cell: Cell, bank: BankView | None) -> Tensor:
        """Log-likelihood of each label word (examples, labels), float32."""
        before = "".join(_shown(drawn.task, e) for e in drawn.context[: cell.context])
        scores = []
        for at in range(0, len(drawn.asked), self.batch_size):
            asked = drawn.asked[at : at + self.batch_size]
            prompts = [before + TASKS[drawn.task].template.format(e.text) for e in asked]
            memory = None if bank is None else self._retrieved(subject, bank, cell, drawn, asked, at)
            scores.append(score_labels(subject, prompts, self._labels[drawn.task], memory))
        return torch.cat(scores)

    def _retrieved(
        self, subject: Subject, bank: BankView, cell: Cell, drawn: Drawn, asked: Sequence[Example], at: int
    ) -> Any:
        """What each example retrieves, a row each."""
        retrieval, top_k = subject.retrieval(), subject.memory.top_k
        if cell.selection == "random":
            chosen = [bank.random(top_k, [seed_of(drawn.seed, at + i)])[0] for i in range(len(asked))]
            return bank.gather(torch.stack(chosen)[None], count=False)
        by_prompt = retrieval.retriever.needs_hidden
        texts = [TASKS[drawn.task].template.format(e.text) if by_prompt else e.text for e in asked]
        asking = embed_texts(retrieval, texts, subject.device, subject.hidden_states)
        return retrieve_for(retrieval, bank, asking[:, None].unbind())

    def report(self, rows: list[Row]) -> Report:
        """Tables and figures."""
        return report(self, rows)


def _tokens(subject: Subject, drawn: Drawn, cell: Cell) -> int:
    """Tokens of all prompts of a cell."""
    shown = "".join(_shown(drawn.task, e) for e in drawn.context[: cell.context])
    asked = [TASKS[drawn.task].template.format(e.text) for e in drawn.asked]
    counts = [len(ids) for ids in subject.tokenizer([shown, *asked], add_special_tokens=False)["input_ids"]]
    return counts[0] * len(asked) + sum(counts[1:])


def _row(drawn: Drawn, cell: Cell) -> Row:
    return {"task": drawn.task, "seed": drawn.seed, **cell._asdict()}


def _judge(scores: Tensor, drawn: Drawn, labels: int) -> Row:
    """Which examples were right, plainly and calibrated, as strings of 0 and 1, and how many the largest class has."""
    truth = torch.tensor([e.label for e in drawn.asked])
    log_p = scores.log_softmax(dim=1)
    # Batch calibration (Zhou et al., arXiv 2309.17249): the mean over the examples asked is the bias of the prompt.
    calibrated = log_p - log_p.mean(dim=0, keepdim=True)
    right = [(s.argmax(dim=1) == truth).int().tolist() for s in (log_p, calibrated)]
    most = int(np.bincount(truth.numpy(), minlength=labels).max())
    return {"hits": "".join(map(str, right[0])), "calibrated": "".join(map(str, right[1])), "majority": most}


def _shown(task: str, example: Example) -> str:
    """A demonstration as it stands in a prompt."""
    return f"{TASKS[task].template.format(example.text)} {TASKS[task].words[example.label]}. "


# ---- demonstrations as entries ----------------------------------------------------------------------------------


def _windows(ids: Sequence[Sequence[int]], window: int) -> Iterator[list[int]]:
    """Which demonstrations are read together: as many whole ones as a window holds, at least one."""
    group: list[int] = []
    held = 0
    for number, tokens in enumerate(ids):
        if group and held + len(tokens) > window:
            yield group
            group, held = [], 0
        group.append(number)
        held += len(tokens)
    if group:
        yield group


def _entries(lengths: Sequence[int], size: int) -> tuple[list[int], list[int], list[int]]:
    """Where entries begin in a window, their lengths, and the demonstration each belongs to."""
    starts: list[int] = []
    held: list[int] = []
    owners: list[int] = []
    begin = 0
    for number, length in enumerate(lengths):
        for at in range(0, length, size):
            starts.append(begin + at)
            held.append(min(size, length - at))
            owners.append(number)
        begin += length
    return starts, held, owners


def _cut(window: Tensor, starts: Sequence[int], lengths: Sequence[int], size: int) -> Tensor:
    """Keys or values (..., T, D) as entries side by side (..., n * C, D), each padded by repeating its last token."""
    first, count = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    places = (first + torch.minimum(torch.arange(size)[None], count - 1)).flatten().to(window.device)
    return window.index_select(-2, places)
