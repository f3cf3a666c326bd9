"""Documents into a bank, and windows scored against it: what the evaluations are made of.

Legend: R documents read side by side, W local tokens, S scored tokens, T tokens of a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.generation import Span, read_windows, reading_stride
from lightning_memlong.model import MemLongOutput
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.text import Windows, WindowSpec, to_device


def read_documents(
    subject: Subject, retrievals: Sequence[Retrieval], documents: Sequence[np.ndarray], window: int
) -> list[BankView]:
    """Read documents window by window, without memory, into a bank that holds all of them.

    Every way of choosing chunks then finds the same keys and values; they are computed once.

    Args:
        subject: Whose model.
        retrievals: Ways of choosing; those of one encoder share a bank.
        documents: R times (T,).
        window: Tokens read at once.

    Returns:
        A bank for each way of choosing; their keys and values are the same tensors.
    """
    first = retrievals[0]
    bank = first.new_bank(len(documents), max(map(len, documents)))
    encoders = {id(r.retriever): r for r in retrievals}
    embedded: dict[int, list[Tensor]] = {name: [] for name in encoders}

    def embed(batch: dict[str, Any], hidden: Tensor | None) -> Tensor:
        for name, retrieval in encoders.items():
            embedded[name].append(retrieval.embed(batch, hidden=hidden))
        return embedded[id(first.retriever)][-1]

    spans = [Span(tokens) for tokens in documents]
    for count in read_windows(subject.model, first, bank, spans, window, subject.autocast, embed=embed):
        subject.progress.advance(count)
    banks: dict[int, BankView] = {id(first.retriever): bank}
    overlap = window - reading_stride(window, first.config.chunk_size)
    for name in encoders:
        if name not in banks:
            again = overlap // first.config.chunk_size
            chunks = torch.cat([e[:, again if number else 0 :] for number, e in enumerate(embedded[name])], dim=1)
            banks[name] = bank.with_embeddings([chunks[row, : len(bank.entries(row))] for row in range(len(documents))])
    return [banks[id(r.retriever)] for r in retrievals]


def _on(subject: Subject, batch: dict[str, Any]) -> dict[str, Any]:
    return to_device(batch, subject.device)


@dataclass(frozen=True)
class ScoredSpans:
    """Which tokens are scored, with what before them."""

    ends: tuple[int, ...]
    """Of each row, the place after the last scored token; 0: nothing is scored in this row."""
    local: int
    """Tokens of the window, scored ones included."""
    scored: int
    """Tokens scored at the end of it; the first token of a window has nothing to be predicted from."""
    context: int
    """Tokens up to the end that may be known: those before the window through memory."""


def window_batch(
    subject: Subject, documents: Sequence[np.ndarray], spans: ScoredSpans, ids: Sequence[int]
) -> dict[str, Any]:
    """The windows of some spans, as a DataModule would give them; ``memory_start`` is where memory may begin.

    Args:
        subject: Whose tokenizer and device.
        documents: R times (T,).
        spans: Which windows.
        ids: Of each document; random draws depend on it, and not on the row.
    """
    local, scored, chunk = spans.local, spans.scored, subject.memory.chunk_size
    places = [
        WindowSpec(number, end - local, tokens[end - local : end]) if end else None
        for number, tokens, end in zip(ids, documents, spans.ends, strict=True)
    ]
    batch = Windows(local, scored, len(documents), subject.tokenizer.pad_token_id or 0).batch(places)
    batch["labels"][:, : local - scored] = -100  # of the window that begins a document, too
    # Queries are made of whole chunks.
    batch["overlap"] = torch.full_like(batch["overlap"], (local - scored) // chunk * chunk)
    batch["memory_start"] = (torch.tensor(spans.ends) - spans.context).clamp(min=0)
    return _on(subject, batch)


@torch.no_grad()
def score_windows(
    subject: Subject, batch: dict[str, Any], memory: Retrieved | None = None
) -> tuple[Tensor, MemLongOutput]:
    """Losses (R, T) float32 on the CPU, 0 where not scored, and the output."""
    with subject.autocast():
        output = subject.model(batch["input_ids"], memory=memory, logits_to_keep=_kept(batch["labels"]))
        labels = batch["labels"][:, -output.hidden.shape[1] :]
        losses = subject.model.head.loss(output.hidden, labels, reduction="none")
    return losses.float().cpu(), output


def score_answer(
    subject: Subject, batch: dict[str, Any], memory: Retrieved | None, answer: np.ndarray
) -> tuple[Measurement, MemLongOutput]:
    """Loss of an answer (a,) that ends a window, and which of its tokens are the most likely ones; and the output."""
    losses, output = score_windows(subject, batch, memory)
    expected = torch.from_numpy(answer)
    with torch.no_grad(), subject.autocast():
        likeliest = subject.model.head.logits(output.hidden[0, -len(expected) - 1 : -1]).argmax(-1).cpu()
    right = likeliest == expected
    found: Measurement = {"nll": float(losses.double().sum()), "tokens": len(expected)}
    return found | {"correct": int(right.all()), "right_tokens": int(right.sum())}, output


def among(memory: Retrieved, place: tuple[int, int], chunk_size: int) -> bool:
    """Whether chunks that were retrieved hold some of the tokens from one place to another."""
    begins = memory.positions[memory.positions >= 0]
    return bool(((begins < place[1]) & (begins + chunk_size > place[0])).any())


def _kept(labels: Tensor) -> int:
    """Positions whose hidden states are needed: the scored tokens', and the one before them."""
    scored = (labels != -100).any(0).nonzero().flatten()
    return labels.shape[1] - max(0, int(scored[0]) - 1) if len(scored) else 1
