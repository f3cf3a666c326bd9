"""What the rows of a bank share: slots for keys and values, one policy, counts."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.bank.checks import check_embedding_size, check_fits, check_insertion
from lightning_memlong.bank.eviction import load_policy
from lightning_memlong.bank.index import has_gpu_index
from lightning_memlong.bank.row import BankRow, Entries
from lightning_memlong.bank.storage import ChunkStorage, Where, as_chunks
from lightning_memlong.bank.transfer import Arriving
from lightning_memlong.config import require
from lightning_memlong.errors import UserError

SPARE = 64
"""Chunks of room beyond what is asked for, since growing copies the bank."""


class BankStore:
    """Slots, rows and policy of a bank; arguments as for :class:`MemoryBank`.

    Keys and values never move once stored: a slot is written at insertion and freed at eviction, so eviction
    costs what the facts of entries cost, and the index is rebuilt from the embeddings that stayed.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        chunk_size: int,
        policy: str,
        policy_args: Mapping[str, Any] | None,
        index: str,
        dtype: torch.dtype | None,
        half_life: float | None,
        where: Where,
        folder: str | None,
    ) -> None:
        self.capacity, self.chunk_size, self.dtype = capacity, chunk_size, dtype
        self.slots = capacity // chunk_size
        """Chunks a row has room for; more than the capacity only while a conversation stores in it."""
        self.where, self.folder = where, folder
        self.policy = load_policy(policy, policy_args)
        self.keeps_everything = policy == "none"
        """Whether nothing is ever evicted, so that there must be room for all."""
        self._index, self._half_life = index, half_life
        self.rows = [self._row(number) for number in range(rows)]
        self.storage: ChunkStorage | None = None
        """Keys and values; None until the first insertion, when their shapes are known."""
        self.one_layer = True
        self.insertions = self.evictions = 0
        self.evicted: list[Entries] = []
        """What the last insertion dropped, of each row where it dropped something; for observers."""

    def _row(self, number: int) -> BankRow:
        return BankRow(number, self.slots, self._index, self._half_life)

    @property
    def embedding_size(self) -> int | None:
        """Length of the stored embeddings; None before the first."""
        return None if self.storage is None else self.rows[0].entries.embeddings.shape[1]

    def allocate(
        self, shape: torch.Size, given: torch.dtype, device: torch.device | str, embedding_size: int, one_layer: bool
    ) -> ChunkStorage:
        """Make the slots on the first insertion, when the shapes are known.

        Raises:
            UserError: If there is not enough memory, or space on the disk; nothing has changed then.
        """
        if self.storage is None:
            slots, dtype = len(self.rows) * self.slots, self.dtype or given
            storage = ChunkStorage(shape, slots, dtype, device, self.where, self.folder, given)
            gpu = torch.device(device).type == "cuda" and has_gpu_index()
            for row in self.rows:
                row.allocate(embedding_size, gpu)
            self.storage, self.one_layer = storage, one_layer
        return self.storage

    def grow(self, capacity: int) -> None:
        """See :meth:`MemoryBank.grow`."""
        size = self.chunk_size
        require(capacity % size == 0, "capacity", capacity, f"a multiple of chunk_size={size}", "round it")
        if capacity > self.capacity:
            self._add_slots(capacity // size)
            self.capacity = capacity

    def reserve(self, row: int, chunks: int) -> None:
        """See :meth:`BankView.reserve`."""
        needed = chunks + len(self.rows[row])
        if needed <= self.slots:
            return
        slots = needed + max(SPARE, needed // 8)
        if self.keeps_everything:
            self.grow(slots * self.chunk_size)
        else:
            self._add_slots(slots)

    def _add_slots(self, slots: int) -> None:
        """Let each row have so many slots; chunks keep the numbers of theirs."""
        if slots <= self.slots:
            return
        if (old := self.storage) is not None:
            count = len(self.rows) * slots
            new = ChunkStorage(old.keys.shape, count, old.dtype, old.device, self.where, self.folder, old.given)
            for row in range(len(self.rows)):
                new.copy_from(old, row * self.slots, row * slots, self.slots)
            self.storage = new
        for entry_row in self.rows:
            entry_row.grow(slots)
        self.slots = slots

    def choose_evicted(self, row: BankRow, count: int) -> Tensor:
        """Which entries of a row have to go so that ``count`` more fit, by the policy.

        Raises:
            UserError: If the policy drops nothing, or what is not there.
        """
        limit = self.capacity // self.chunk_size
        if not count or len(row) + count <= limit:
            return torch.empty(0, dtype=torch.long)
        kept = torch.arange(len(row))
        while len(kept) + count > limit:
            entries = row.entries.take(kept)
            facts = {"counters": entries.counters, "scores": entries.scores, "lengths": entries.lengths}
            facts |= {"ages": row.ages[kept], "idle": row.idle[kept]}
            drop = self.policy({**facts, "capacity": self.capacity})
            if drop.dtype != torch.long or not len(drop) or int(drop.min()) < 0 or int(drop.max()) >= len(kept):
                raise UserError(
                    f"memory.policy: it returned {drop}. Allowed: a tensor of int64 with at least one index from 0 to "
                    f"{len(kept) - 1}. Fix: correct the policy; see lightning_memlong/bank/eviction.py."
                )
            stays = torch.ones(len(kept), dtype=torch.bool)
            stays[drop] = False
            kept = kept[stays]
        gone = torch.ones(len(row), dtype=torch.bool)
        gone[kept] = False
        return gone.nonzero().flatten()

    # ---- writing ------------------------------------------------------------------------------------------

    def insert(
        self,
        numbers: Sequence[int],
        keys: Tensor,
        values: Tensor,
        embeddings: Tensor,
        lengths: Tensor,
        positions: Tensor,
        evict: bool,
    ) -> None:
        """See :meth:`BankView.insert`; the R rows are those of ``numbers``."""
        room = self.capacity if evict else self.slots * self.chunk_size
        check_insertion(keys, values, embeddings, lengths, len(numbers), self.chunk_size, room)
        check_embedding_size(embeddings, self.embedding_size)
        chunk_keys, chunk_values = (as_chunks(t[None] if t.dim() == 4 else t, self.chunk_size) for t in (keys, values))
        check_fits(keys, chunk_keys, self.storage)
        storage = self.allocate(
            chunk_keys.shape, keys.dtype, keys.device, embeddings.shape[-1], one_layer=keys.dim() == 4
        )
        staged = storage.stage(chunk_keys, chunk_values)
        embeddings, lengths, positions = (t.detach().cpu() for t in (embeddings.float(), lengths, positions))
        # A policy may refuse: then nothing has happened yet in any row.
        wanted = (lengths > 0).sum(dim=1).tolist()
        drops = [self.choose_evicted(self.rows[number], count if evict else 0)
                 for number, count in zip(numbers, wanted, strict=True)]  # fmt: skip
        self.evicted = []
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for row, (number, dropped) in enumerate(zip(numbers, drops, strict=True)):
            if wanted[row]:
                self._evict(self.rows[number], dropped)
                real = lengths[row].nonzero().flatten()
                slots = self.rows[number].append(embeddings[row, real], positions[row, real], lengths[row, real])
                targets.append(number * self.slots + slots)
                sources.append(row * lengths.shape[1] + real)
                self.insertions += len(real)
        if targets:
            storage.write(staged, torch.cat(sources), torch.cat(targets))

    def _evict(self, row: BankRow, dropped: Tensor) -> None:
        if len(dropped):
            self.evicted.append(row.entries.take(dropped))
            row.drop(dropped)
            self.evictions += len(dropped)

    def overwrite(self, number: int, keys: Tensor, values: Tensor, positions: Tensor) -> int:
        """See :meth:`BankView.overwrite`."""
        assert self.storage is not None
        entries = self.rows[number].entries
        chunk_keys, chunk_values = (
            as_chunks((t[None] if t.dim() == 3 else t)[:, None], self.chunk_size) for t in (keys, values)
        )
        sources, places = (positions[:, None] == entries.positions[None]).nonzero(as_tuple=True)
        if len(sources):
            staged = self.storage.stage(chunk_keys, chunk_values)
            self.storage.write(staged, sources, number * self.slots + entries.slots[places])
        return len(sources)

    # ---- reading ------------------------------------------------------------------------------------------

    def read(self, slots: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of slots (R, k), zeros where ``real`` (R, k) is false, shaped as in :class:`Retrieved`."""
        assert self.storage is not None
        keys, values = self.storage.read(slots, real)
        return (keys[0], values[0]) if self.one_layer else (keys, values)

    def read_ahead(self, slots: Tensor, real: Tensor) -> Future[Arriving]:
        """Keys and values as :meth:`ChunkStorage.read_ahead` has them, beside the model's lower layers."""
        assert self.storage is not None
        return self.storage.read_ahead(slots, real)

    def emptied(self) -> "BankStore":
        """A store with these settings and nothing in it."""
        other = object.__new__(BankStore)
        vars(other).update(vars(self), storage=None, rows=[self._row(row.number) for row in self.rows], evicted=[])
        return other

    def with_rows(self, rows: list[BankRow]) -> "BankStore":
        """A store that shares keys and values with this one, but has other rows."""
        other = object.__new__(BankStore)
        vars(other).update(vars(self), rows=rows)
        return other

    def become(self, other: "BankStore") -> None:
        """Hold what another store holds; views of this one see it too."""
        vars(self).update(vars(other))
