"""Demonstrations of a task as text, and as entries of a bank.

Legend: N demonstrations, n entries, C tokens of an entry, E embedding size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_memlong.bank import BankView
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.tasks import TASKS, Example
from lightning_memlong.retrieval import Chunks, Retriever


class Shots(NamedTuple):
    """One way of giving demonstrations."""

    context: int
    """Demonstrations in the context."""
    memory: int
    """Demonstrations in memory; 0: memory off."""
    selection: str
    """How entries are chosen."""

    @property
    def label(self) -> str:
        """``4 + 200 (similarity)``."""
        return f"{self.context} + {self.memory} ({self.selection})" if self.memory else f"{self.context}"


def demonstration_text(task: str, example: Example) -> str:
    """A demonstration as it stands in a prompt."""
    return f"{TASKS[task].template.format(example.text)} {TASKS[task].words[example.label]}. "


def read_demonstrations(subject: Subject, task: str, examples: Sequence[Example], window: int) -> BankView:
    """Demonstrations as entries of a bank of one row."""
    texts = [demonstration_text(task, e) for e in examples]
    ids = [subject.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    retrieval, size = subject.retrieval(), subject.memory.chunk_size
    entries = sum(-(-len(i) // size) for i in ids)
    bank = retrieval.new_bank(1, entries * size)
    place = 0
    for group in demonstration_windows(ids, window):
        # Another demonstration before them: the first token that is read is a sink of attention, and is not kept.
        begun, tokens = ids[group[0] - 1], [t for i in group for t in ids[i]]
        batch = torch.tensor([[*begun, *tokens]], device=subject.device)
        with torch.no_grad(), subject.autocast():
            output = subject.model(batch, logits_to_keep=1)
        starts, lengths, owners = demonstration_entries([len(ids[i]) for i in group], size)
        keys, values = (_cut(t[..., len(begun) :, :], starts, lengths, size) for t in (output.keys, output.values))
        hidden = output.memory_hidden[:, len(begun) :]
        read = [examples[i].text for i in group]
        embeddings = _embeddings(retrieval.retriever, hidden, read, starts, lengths, owners, size)
        positions = place + torch.tensor(starts)
        bank.insert(keys, values, embeddings[None], torch.tensor(lengths)[None], positions[None])
        place += len(tokens)
    return bank


def _embeddings(
    retriever: Retriever,
    hidden: Tensor,
    texts: Sequence[str],
    starts: Sequence[int],
    lengths: Sequence[int],
    owners: Sequence[int],
    size: int,
) -> Tensor:
    """Embeddings (n, E) of entries: of their hidden states, or of the whole text of the demonstration they are from."""
    if not retriever.needs_hidden:
        return retriever.encode(list(texts))[torch.tensor(owners)]
    states = _cut(hidden, starts, lengths, size)[0].detach().float().cpu().unflatten(0, (-1, size))
    return retriever.embed(Chunks(torch.empty(0), torch.tensor(lengths), lambda _: [], states))


def demonstration_windows(ids: Sequence[Sequence[int]], window: int) -> Iterator[list[int]]:
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


def demonstration_entries(lengths: Sequence[int], size: int) -> tuple[list[int], list[int], list[int]]:
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
