"""What a bank refuses to store, told before anything has changed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_memlong.errors import UserError

if TYPE_CHECKING:
    from lightning_memlong.bank.memory_bank import MemoryBank


def check_insertion(bank: MemoryBank, keys: Tensor, values: Tensor, embeddings: Tensor, lengths: Tensor) -> None:
    """Check what :meth:`MemoryBank.insert` was given.

    Raises:
        UserError: If a shape or type does not fit the bank, a window is larger than a row, or something is not finite.
    """
    rows, tokens = keys.shape[-4], keys.shape[-2]
    expected = (bank.rows, tokens // bank.chunk_size)
    if keys.shape != values.shape or rows != bank.rows or tokens % bank.chunk_size:
        raise UserError(
            f"bank.insert: keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit. Allowed: equal "
            f"shapes with {bank.rows} rows and a multiple of {bank.chunk_size} tokens. Fix: pad the window."
        )
    if embeddings.shape[:2] != expected or tuple(lengths.shape) != expected:
        raise UserError(
            f"bank.insert: embeddings {tuple(embeddings.shape)} and lengths {tuple(lengths.shape)} do not fit. "
            f"Allowed: {expected} chunks. Fix: give one of each for every chunk of the window."
        )
    check_embedding_size(bank, embeddings)
    if not (keys.is_floating_point() and values.is_floating_point()):
        raise UserError(
            f"bank.insert: keys are {keys.dtype} and values {values.dtype}. Allowed: floating-point types. Fix: "
            "convert them."
        )
    room = bank.capacity // bank.chunk_size
    if expected[1] > room and int((lengths > 0).sum(dim=1).max()) > room:
        raise UserError(
            f"bank.insert: a window of {tokens} tokens does not fit into a row of {bank.capacity}. Allowed: a "
            "memory.capacity of at least data.window. Fix: raise --memory.capacity, or lower --data.window."
        )
    if not bool(torch.isfinite(embeddings).all()):
        raise UserError("bank.insert: an embedding is not finite. Fix: check the retriever's precision.")
    for name, given in (("keys", keys), ("values", values)):
        # One pass over the numbers: a sum is finite only if all of them are (and float16 adds up to little).
        wide = torch.float32 if given.dtype == torch.float16 else None
        if not math.isfinite(float(given.detach().sum(dtype=wide))):
            raise UserError(
                f"bank.insert: {name} are not all finite. Allowed: numbers. Fix: a lower --model.optimizer.lr or "
                "another --trainer.precision; the model's own activations have overflowed."
            )


def check_embedding_size(bank: MemoryBank, embeddings: Tensor) -> None:
    """Check that embeddings (..., E) are of the length the bank holds.

    Raises:
        UserError: If not: they come from another retriever.
    """
    held = bank.entries(0).embeddings.shape[1] if bank._ledgers else embeddings.shape[-1]
    if embeddings.shape[-1] != held:
        raise UserError(
            f"bank: embeddings of length {embeddings.shape[-1]} do not fit the stored ones ({held}). Allowed: those of "
            "the retriever the bank was filled with. Fix: use that one, or a new bank."
        )
