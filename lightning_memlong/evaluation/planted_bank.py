"""A bank of filler, made for a while the bank of a document with something planted in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.generation import reading_stride, sink_before
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.text import window_offsets
from lightning_memlong.text.planting import Probe


@contextmanager
def planted_bank(
    subject: Subject, retrieval: Retrieval, bank: BankView, probe: Probe, filler: np.ndarray, window: int
) -> Iterator[None]:
    """The bank as if the probe's document had been read instead of its filler; then as it was."""
    document = np.concatenate([probe.tokens[: probe.question], filler[probe.question :]])
    stride = reading_stride(window, bank.chunk_size)
    every = window_offsets(sum(bank.entries(0).lengths.tolist()), window, stride)
    offsets = [at for at in every if any(start < at + window and at < end for start, end in probe.changed)]
    was = [_write(subject, retrieval, bank, document, offset, window) for offset in offsets]
    try:
        yield
    finally:
        for chunks in was:
            _put_back(bank, *chunks)


@torch.no_grad()
def _write(
    subject: Subject, retrieval: Retrieval, bank: BankView, tokens: np.ndarray, offset: int, window: int
) -> tuple[Retrieved, Tensor]:
    """Read one window and put its keys, values and embeddings where the bank has the chunks it stored.

    Returns:
        What was there: the record of those chunks, and their embeddings.
    """
    held = bank.entries(0)
    end = min(offset + window, int((held.positions + held.lengths).max()))
    ids = torch.from_numpy(tokens[offset:end].astype(np.int64))[None].to(subject.device)
    size = bank.chunk_size
    padded = torch.nn.functional.pad(ids, (0, -ids.shape[1] % size))
    with subject.autocast():
        sink = sink_before(subject.model, subject.tokenizer, offset, window, size)
        found = subject.model.capture(padded, bos=sink, hidden=True)
        keys, values = found["keys"][..., 0, :, :, :], found["values"][..., 0, :, :, :]
    positions = torch.arange(offset, end, size)
    positions[: (window - reading_stride(window, size)) // size if offset else 0] = -1  # stored with the window before
    match = (positions[:, None] == held.positions[None]).nonzero()
    was = bank.gather(match[None, :, 1], count=False)
    assert was is not None
    before = held.embeddings[match[:, 1]]
    bank.overwrite(0, keys, values, positions)
    batch = {"input_ids": padded, "length": torch.tensor([ids.shape[1]])}
    held.embeddings[match[:, 1]] = retrieval.embed(batch, hidden=found["hidden"])[0, match[:, 0]]
    return was, before


def _put_back(bank: BankView, was: Retrieved, embeddings: Tensor) -> None:
    """Undo :func:`_write`."""
    bank.overwrite(0, was.keys[..., 0, :, :, :], was.values[..., 0, :, :, :], was.positions[0])
    bank.entries(0).embeddings[was.entries[0]] = embeddings
