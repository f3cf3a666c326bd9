"""Room in a bank: more of it, one row alone, and taking back what was stored last."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, NamedTuple

from lightning_memlong.config import require
from lightning_memlong.storage import ChunkStorage

if TYPE_CHECKING:
    from lightning_memlong.bank import MemoryBank


class Mark(NamedTuple):
    """A state of a row to come back to."""

    serial: int
    end: int


def grow(bank: MemoryBank, capacity: int) -> None:
    """See :meth:`MemoryBank.grow`.

    Raises:
        UserError: If there is not enough memory, or space on the disk; the bank is then as it was.
    """
    size = bank.chunk_size
    require(capacity % size == 0, "capacity", capacity, f"a multiple of chunk_size={size}", "round it")
    if capacity <= bank.capacity:
        return
    bank._settle()
    before, slots = bank.slots, capacity // size
    if bank._storage is not None:
        old = bank._storage
        new = ChunkStorage(
            old.keys.shape, bank.rows * slots, old.dtype, old.device, bank.storage, bank.storage_folder, old.given
        )
        for row in range(bank.rows):
            new.copy_from(old, row * before, row * slots, before)
        bank._storage = new
        for ledger in bank._ledgers:
            ledger.grow(slots)
    bank.capacity, bank.slots = capacity, slots


SPARE = 64
"""Chunks of room beyond what is asked for, since growing copies the bank."""


def make_room(bank: MemoryBank, row: int, chunks: int) -> None:
    """Let a bank that keeps everything have room for so many more chunks in a row.

    Raises:
        UserError: As :func:`grow`.
    """
    needed = chunks + (len(bank.entries(row)) if bank._ledgers else 0)
    if bank.keeps_everything and needed > bank.slots:
        grow(bank, (needed + max(SPARE, needed // 8)) * bank.chunk_size)


def only(bank: MemoryBank, row: int) -> MemoryBank:
    """See :meth:`MemoryBank.only`."""
    if bank.rows == 1:
        return bank
    other = copy(bank)
    other.rows, other._first, other._ledgers = 1, bank._first + row, bank._ledgers[row : row + 1]
    return other


def mark(bank: MemoryBank, row: int) -> Mark:
    """See :meth:`MemoryBank.mark`."""
    ledger = bank._ledgers[row] if bank._ledgers else None
    return Mark(0, 0) if ledger is None else Mark(ledger.serial, ledger.end)


def go_back(bank: MemoryBank, row: int, to: Mark) -> None:
    """See :meth:`MemoryBank.go_back`."""
    if not bank._ledgers:
        return
    ledger = bank._ledgers[row]
    later = (ledger.entries.born >= to.serial).nonzero().flatten()
    if len(later):
        ledger.drop(later)
    ledger.serial, ledger.end = to
    ledger.entries.used.clamp_(max=max(0, to.serial - 1))
    ledger.tokens = ledger.tokens[: to.end]
