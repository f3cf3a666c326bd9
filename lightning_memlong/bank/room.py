"""Room in a bank: more of it, one row alone, what was read, and taking back what was stored last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_memlong.bank.row import Ledger
from lightning_memlong.bank.storage import ChunkStorage
from lightning_memlong.config import require

if TYPE_CHECKING:
    from lightning_memlong.bank.memory_bank import MemoryBank

SPARE = 64
"""Chunks of room beyond what is asked for, since making room copies the bank."""


class Mark(NamedTuple):
    """A state of a row to come back to."""

    serial: int
    end: int


class Room:
    """What :class:`MemoryBank` does about room, beside storing and finding."""

    rows: int
    capacity: int
    chunk_size: int
    slots: int
    """Chunks a row has room for; more than ``capacity`` only while a conversation stores in it."""
    keeps_everything: bool
    insertions: int
    _storage: ChunkStorage | None
    _ledgers: list[Ledger]
    _guests: dict[int, int]

    @property
    def _bank(self) -> MemoryBank:
        return cast("MemoryBank", self)

    # ---- more of it ---------------------------------------------------------------------------------------

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` [tokens] in each row; entries stay as they are. A smaller one changes nothing.

        Raises:
            UserError: If there is not enough memory, or space on the disk; the bank is then as it was.
        """
        size = self.chunk_size
        require(capacity % size == 0, "capacity", capacity, f"a multiple of chunk_size={size}", "round it")
        if capacity > self.capacity:
            self._stretch(capacity // size)
            self.capacity = capacity

    def make_room(self, row: int, chunks: int) -> None:
        """Have room for so many more chunks in a row, evicting nothing; a bank that evicts keeps its capacity.

        Raises:
            UserError: As :meth:`grow`.
        """
        needed = chunks + (len(self._ledgers[row]) if self._ledgers else 0)
        if needed <= self.slots:
            return
        slots = needed + max(SPARE, needed // 8)
        if self.keeps_everything:
            self.grow(slots * self.chunk_size)
        else:
            self._stretch(slots)

    def _stretch(self, slots: int) -> None:
        """Let each row have so many slots; chunks keep the numbers of theirs."""
        self._bank._settle()
        if slots > self.slots and (old := self._storage) is not None:
            bank = self._bank
            new = ChunkStorage(
                old.keys.shape, bank.rows * slots, old.dtype, old.device, bank.storage, bank.storage_folder, old.given
            )
            for row in range(bank.rows):
                new.copy_from(old, row * self.slots, row * slots, self.slots)
            self._storage = new
            for ledger in self._ledgers:
                ledger.grow(slots)
        self.slots = max(slots, self.slots)

    # ---- one row ------------------------------------------------------------------------------------------

    def only(self, row: int) -> MemoryBank:
        """A bank of one row, which is row ``row`` of this one: what is stored in one is stored in both."""
        return self._bank if self.rows == 1 else _row_of(self._bank, row)

    def tokens(self, row: int) -> Tensor:
        """(T,) int32, what was read into a row, by place in the document; empty where nobody noted it."""
        return self._ledgers[row].tokens if self._ledgers else torch.empty(0, dtype=torch.int32)

    def note_tokens(self, row: int, tokens: Tensor, place: int) -> None:
        """Note the (n,) tokens from ``place`` on, so that passages can be shown and reading goes on.

        Where those before them were not noted, nothing is.
        """
        ledger = self._ledgers[row]
        if len(ledger.tokens) == place:
            ledger.tokens = torch.cat([ledger.tokens, tokens.to(torch.int32).cpu()])

    # ---- taking back --------------------------------------------------------------------------------------

    def mark(self, row: int) -> Mark:
        """Where a row is now, for :meth:`go_back`."""
        ledger = self._ledgers[row] if self._ledgers else None
        return Mark(0, 0) if ledger is None else Mark(ledger.serial, ledger.end)

    def go_back(self, row: int, to: Mark) -> None:
        """Take out what was stored in a row since :meth:`mark`; counters keep what they counted."""
        self._guests.pop(row, None)
        if self._ledgers:
            ledger = self._ledgers[row]
            self._take_out(ledger, ledger.entries.born >= to.serial, *to)

    def cut(self, row: int, place: int) -> int:
        """Take out of a row the chunks that reach beyond ``place`` [tokens]; gives where what is left ends."""
        ledger = self._ledgers[row]
        held = ledger.entries
        later = held.positions + held.lengths > place
        end = int(held.positions[later].min()) if bool(later.any()) else place
        self._take_out(ledger, later, ledger.serial - int(later.sum()), end)
        return end

    @staticmethod
    def _take_out(ledger: Ledger, later: Tensor, serial: int, end: int) -> None:
        if bool(later.any()):
            ledger.drop(later.nonzero().flatten())
        ledger.serial, ledger.end = serial, end
        ledger.entries.used.clamp_(max=max(0, serial - 1))
        ledger.tokens = ledger.tokens[:end]

    # ---- conversations ------------------------------------------------------------------------------------

    def lend(self, row: int, guest: int) -> None:
        """Let a conversation store in a row; until it is closed, nobody else may.

        Raises:
            UserError: If another one does.
        """
        self.require_free(row, guest)
        self._guests[row] = guest

    def require_free(self, row: int, guest: int | None = None) -> None:
        """Check that no conversation other than ``guest`` has its text in a row.

        Raises:
            UserError: If one has.
        """
        other = self._guests.get(row)
        allowed, fix = "one conversation at a time in a row", "close that conversation first"
        require(other in (None, guest), "memory", f"row {row} holds the text of an open conversation", allowed, fix)


def _row_of(bank: MemoryBank, row: int) -> MemoryBank:
    from lightning_memlong.bank.memory_bank import MemoryBank

    class Row(MemoryBank):
        """A row seen as a bank: everything else is the bank's, and is changed there."""

        rows = 1

        def __init__(self) -> None:
            pass

        # Attributes of a bank, which here follow the bank's.
        _first = property(lambda self: row)  # type: ignore[assignment]
        _ledgers = property(lambda self: bank._ledgers[row : row + 1])  # type: ignore[assignment]

        def __getattr__(self, name: str) -> Any:
            return getattr(bank, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(bank, name, value)

        def _allocate(self, *shape: Any, **facts: Any) -> ChunkStorage:
            return bank._allocate(*shape, **facts)

    return Row()
