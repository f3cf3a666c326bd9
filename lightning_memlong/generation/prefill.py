"""Texts into a bank, window by window: what a document leaves behind for whoever asks about it.

Legend: R rows read side by side, W tokens of a window, C tokens of a chunk, T tokens of a text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import BankView
from lightning_memlong.model import MemLongModel
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.text import Windows, WindowSpec, to_device

Autocast = Callable[[], AbstractContextManager[Any]]
Embed = Callable[[dict[str, Any], Tensor | None], Tensor]


@dataclass(frozen=True)
class Span:
    """Part of a document that is to be read."""

    tokens: np.ndarray
    """(T,), those that are only context for the first of the others included."""
    offset: int = 0
    """Where it begins in its document [tokens]."""
    known: int = 0
    """Tokens at its beginning that are stored already [tokens]."""


def reading_stride(window: int, chunk_size: int) -> int:
    """Tokens from one reading window to the next; a window of one chunk cannot overlap."""
    return window - chunk_size if window >= 2 * chunk_size else window


@contextmanager
def evaluating(model: MemLongModel) -> Iterator[None]:
    """Evaluation mode while a block runs, then the mode the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def read_windows(
    model: MemLongModel,
    retrieval: Retrieval,
    bank: BankView,
    spans: Sequence[Span],
    window: int,
    autocast: Autocast = nullcontext,
    retrieve: bool = False,
    embed: Embed | None = None,
    begin: int = 0,
) -> Iterator[int]:
    """Read R spans side by side into the R rows of a bank; gives how many tokens each window was.

    The first token of whatever a decoder reads gathers attention (a sink), and would go on doing so out of memory. So
    windows overlap by a chunk, whose keys and values are those of the window before; and before the first one stands
    another token.

    Args:
        model: Reads.
        retrieval: How chunks are embedded.
        bank: Where they go.
        spans: What is read.
        window: Tokens read at once; a multiple of the chunk size.
        autocast: Context in which the model computes.
        retrieve: Whether windows retrieve and attend to what was read before, as in training: a bank that has to forget
            must know what is used.
        embed: Embeddings (R, n, E) of a batch, given hidden states if there are any; None: by ``retrieval``.
        begin: Where the first window begins that is not in the bank yet [tokens].
    """
    size = retrieval.config.chunk_size
    stride = reading_stride(window, size)
    windows = Windows(window, stride, len(spans), retrieval.tokenizer.pad_token_id or 0)
    hidden_wanted = retrieval.retriever.needs_hidden or embed is not None
    for start in windows.offsets(max(len(s.tokens) for s in spans)):
        if start < begin:
            continue
        batch = _batch(windows, spans, start, size)
        batch = to_device(batch, model.device)
        sink = sink_before(model, retrieval.tokenizer, start, window, size)
        memory = retrieval.retrieve(bank, batch) if retrieve else None
        if embed is None:
            retrieval.embed_ahead(batch)
        with autocast():
            found = model.capture(batch["input_ids"], memory, sink, hidden_wanted)
        retrieval.count_use(bank, memory, found.get("chunk_use"))
        embeddings = None if embed is None else embed(batch, found.get("hidden"))
        retrieval.store(bank, found, batch, embeddings)
        new = (batch["length"] - batch["overlap"]).clamp(min=0).tolist()
        for row, (span, count) in enumerate(zip(spans, new, strict=True)):
            if count:
                end = start + int(batch["length"][row])
                new_ones = torch.from_numpy(span.tokens[end - count : end].astype(np.int32))
                bank.row(row).append_tokens(new_ones, span.offset + end - count)
        yield sum(new)


def sink_before(model: MemLongModel, tokenizer: Any, offset: int, window: int, chunk_size: int) -> int | None:
    """What stands before a window: the model's own first token; or, where no context does, a first token.

    Args:
        model: Who reads.
        tokenizer: Its backbone's.
        offset: Where the window begins in what is read [tokens].
        window: Tokens of it.
        chunk_size: Tokens of a chunk.
    """
    alone = offset == 0 or reading_stride(window, chunk_size) == window
    return first_of_all(model, tokenizer) if alone else model.bos


def first_of_all(model: MemLongModel, tokenizer: Any) -> int | None:
    """The token a text begins with: the model's own, the tokenizer's first or last one; None where it names none."""
    named = (model.bos, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((token for token in named if token is not None), None)


def _batch(windows: Windows, spans: Sequence[Span], start: int, size: int) -> dict[str, Tensor]:
    """The windows that begin at ``start`` of each span, padded to whole chunks, no longer than needed."""
    cut = [s.tokens[start : start + windows.window] for s in spans]
    batch = windows.batch([WindowSpec(row, start, t) if len(t) else None for row, t in enumerate(cut)])
    longest = -(-max(map(len, cut)) // size) * size
    batch["input_ids"] = batch["input_ids"][:, :longest]
    del batch["labels"]  # nothing is scored
    overlap = windows.window - windows.stride
    known = [min(s.known if start == 0 else overlap, len(c)) for s, c in zip(spans, cut, strict=True)]
    batch["overlap"] = torch.tensor(known)
    # A row that has nothing new stands where nothing was before: it retrieves nothing, and nothing counts as used.
    places = [(s.offset + start) * (len(c) > n) for s, c, n in zip(spans, cut, known, strict=True)]
    batch["offset"] = torch.tensor(places)
    return batch


SEAM = 8
"""Last tokens of a text that may become others when it goes on."""


def common_prefix(bank: BankView, row: int, tokens: np.ndarray) -> int | None:
    """How many tokens a bank's row and a text begin with in common, if what the row holds is the text's beginning."""
    held, end = bank.row(row).tokens.numpy(), int(bank.ends()[row])
    if len(held) != end:
        return None
    both = min(end, len(tokens))
    differ = np.flatnonzero(held[:both] != tokens[:both])
    common = int(differ[0]) if len(differ) else both
    # A text that only ends earlier is another one; where it differs, it goes on from a seam.
    seam = common < len(tokens) and end > SEAM and common >= end - SEAM
    return common if common == end or seam else None


def remaining(bank: BankView, row: int, tokens: np.ndarray) -> Span:
    """What of a text is still to be read into a row."""
    end = int(bank.ends()[row])
    common = common_prefix(bank, row, tokens)
    if common is None:
        return Span(tokens, end)
    if common < end:
        end = bank.row(row).truncate(common)
    known = bank.chunk_size if end >= bank.chunk_size else 0
    return Span(tokens[end - known :], end - known, known)
