"""What a bank refuses to store, told before anything has changed."""

import math

import torch
from torch import Tensor

from lightning_memlong.bank.storage import ChunkStorage
from lightning_memlong.errors import UserError


def check_insertion(
    keys: Tensor, values: Tensor, embeddings: Tensor, lengths: Tensor, bank_rows: int, chunk_size: int, room: int
) -> None:
    """Check what :meth:`BankView.insert` was given.

    Args:
        keys: As there.
        values: As there.
        embeddings: As there.
        lengths: As there.
        bank_rows: Rows there are.
        chunk_size: Tokens of a chunk.
        room: Of a row, once it has evicted what it may [tokens].

    Raises:
        UserError: If a shape or type does not fit the bank, a window is larger than a row, or something is not finite.
    """
    _check_shapes(keys, values, embeddings, lengths, bank_rows, chunk_size)
    if not (keys.is_floating_point() and values.is_floating_point()):
        raise UserError(
            f"bank.insert: keys are {keys.dtype} and values {values.dtype}. Allowed: floating-point types. Fix: "
            "convert them."
        )
    chunks, tokens = room // chunk_size, keys.shape[-2]
    if lengths.shape[1] > chunks and int((lengths > 0).sum(dim=1).max()) > chunks:
        raise UserError(
            f"bank.insert: a window of {tokens} tokens does not fit into a row of {room}. Allowed: a "
            "memory.capacity of at least data.window. Fix: raise --memory.capacity, or lower --data.window."
        )
    if not bool(torch.isfinite(embeddings).all()):
        raise UserError("bank.insert: an embedding is not finite. Fix: check the retriever's precision.")
    # One pass over the numbers: a sum is finite only if all of them are (and float16 adds up to little).
    wide = [torch.float32 if t.dtype == torch.float16 else None for t in (keys, values)]
    sums = [t.detach().sum(dtype=dtype) for t, dtype in zip((keys, values), wide, strict=True)]
    totals = torch.stack(sums).tolist()  # one question to the device
    for name, total in zip(("keys", "values"), totals, strict=True):
        if not math.isfinite(total):
            raise UserError(
                f"bank.insert: {name} are not all finite. Allowed: numbers. Fix: a lower --model.optimizer.lr or "
                "another --trainer.precision; the model's own activations have overflowed."
            )


def _check_shapes(
    keys: Tensor, values: Tensor, embeddings: Tensor, lengths: Tensor, bank_rows: int, chunk_size: int
) -> None:
    rows, tokens = keys.shape[-4], keys.shape[-2]
    expected = (bank_rows, tokens // chunk_size)
    if keys.shape != values.shape or rows != bank_rows or tokens % chunk_size:
        raise UserError(
            f"bank.insert: keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit. Allowed: equal "
            f"shapes with {bank_rows} rows and a multiple of {chunk_size} tokens. Fix: pad the window."
        )
    if embeddings.shape[:2] != expected or tuple(lengths.shape) != expected:
        raise UserError(
            f"bank.insert: embeddings {tuple(embeddings.shape)} and lengths {tuple(lengths.shape)} do not fit. "
            f"Allowed: {expected} chunks. Fix: give one of each for every chunk of the window."
        )


def check_fits(keys: Tensor, chunks: Tensor, storage: ChunkStorage | None) -> None:
    """Check that the chunks (L, H, m, C, D) of ``keys`` are like those that are stored already.

    Raises:
        UserError: If not: they come from another model.
    """
    if storage is not None and not storage.fits(chunks.shape):
        raise UserError(
            f"bank.insert: keys {tuple(keys.shape)} do not fit the stored ones (layers, heads or head size differ: "
            f"{tuple(storage.keys.shape)}). Fix: use one bank for one model."
        )


def check_embedding_size(embeddings: Tensor, stored: int | None) -> None:
    """Check that embeddings (..., E) are of the length a bank holds; None: it holds none yet.

    Raises:
        UserError: If not: they come from another retriever.
    """
    if stored is not None and embeddings.shape[-1] != stored:
        raise UserError(
            f"bank: embeddings of length {embeddings.shape[-1]} do not fit the stored ones ({stored}). Allowed: those "
            "of the retriever the bank was filled with. Fix: use that one, or a new bank."
        )
