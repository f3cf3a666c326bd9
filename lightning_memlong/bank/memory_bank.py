"""The memory bank: keys, values and embeddings of chunks, one row a document stream.

Legend: R rows, n chunks of a window, C tokens of a chunk, T = n * C, S slots a row, M = k * C retrieved tokens,
L stored layers, H key/value heads, D head size, E embedding size.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank.checks import check_embedding_size, check_insertion
from lightning_memlong.bank.eviction import load_policy
from lightning_memlong.bank.index import has_gpu_index
from lightning_memlong.bank.kept import Kept
from lightning_memlong.bank.retrieved import Coming, Retrieved
from lightning_memlong.bank.room import Room
from lightning_memlong.bank.row import Entries, Ledger
from lightning_memlong.bank.storage import ChunkStorage, Where, as_chunks
from lightning_memlong.config import require
from lightning_memlong.errors import UserError

__all__ = ["MemoryBank", "Retrieved"]


class MemoryBank(Room, Kept):
    """Preallocated, non-trainable storage with retrieval and eviction, for R independent rows.

    Keys and values never move once stored: a slot is written at insertion and freed at eviction, so eviction
    costs what the ledger costs, and the index is rebuilt from the embeddings that stayed.

    Args:
        rows: Document streams (batch rows).
        capacity: Size of a row [tokens]; a multiple of ``chunk_size``.
        chunk_size: Tokens of an entry.
        policy: Name or import path of an eviction policy.
        policy_args: Its keyword arguments.
        index: FAISS ``index_factory`` string.
        dtype: Element type of stored K/V; None keeps that of the first insertion; int8 has a scale for each head of
            each token, and is read as the type of the first insertion.
        half_life: Insertions after which a retrieval counts for half; None: it never fades.
        storage: Where K/V live: ``device``, ``host`` or ``disk`` (see :class:`ChunkStorage`).
        storage_folder: Folder for ``disk``; None: the system's for temporary files.

    Raises:
        UserError: For a capacity that is no multiple of the chunk size, or an unknown policy.
    """

    def __init__(
        self,
        rows: int = 1,
        capacity: int = 32768,
        chunk_size: int = 128,
        policy: str = "retrieval_frequency",
        policy_args: Mapping[str, Any] | None = None,
        index: str = "Flat",
        dtype: torch.dtype | None = None,
        half_life: float | None = None,
        storage: Where = "device",
        storage_folder: str | None = None,
    ) -> None:
        allowed = f"a multiple of chunk_size={chunk_size}, at least two chunks"
        require(capacity % chunk_size == 0 and capacity >= 2 * chunk_size, "capacity", capacity, allowed, "round it")
        self.rows, self.capacity, self.chunk_size, self.index, self.dtype = rows, capacity, chunk_size, index, dtype
        self.slots, self.half_life = capacity // chunk_size, half_life
        self.storage, self.storage_folder = storage, storage_folder
        self._policy = load_policy(policy, policy_args)
        self.keeps_everything = policy == "none"
        """Whether nothing is ever evicted, so that there must be room for all."""
        self._ledgers: list[Ledger] = []
        self._storage: ChunkStorage | None = None
        self._one_layer = True
        self._first = 0
        self._guests: dict[int, int] = {}
        self.made_with = {}
        self.insertions = self.evictions = 0
        self.evicted: list[Entries] = []
        """What the last insertion dropped, of each row where it dropped something; for observers."""
        self._reader: ThreadPoolExecutor | None = None
        self._pending: Future[tuple[Tensor, Tensor]] | None = None

    def insert(
        self,
        keys: Tensor,
        values: Tensor,
        embeddings: Tensor,
        lengths: Tensor,
        positions: Tensor,
        evict: bool = True,
    ) -> None:
        """Store the chunks of one window of each row, evicting where a row is full.

        Args:
            keys: (R, H, T, D), or (L, R, H, T, D) for several layers; before rotary embedding.
            values: Shaped as ``keys``.
            embeddings: (R, n, E) unit vectors.
            lengths: (R, n) real tokens of each chunk; a chunk of length 0 is not stored.
            positions: (R, n) place of each chunk's first token in its document.
            evict: False where :meth:`make_room` has made room, beyond the capacity if need be.

        Raises:
            UserError: If a shape does not fit the bank, a window has more chunks than a row has room for, or something
                is not finite; the bank is then as it was.
        """
        check_insertion(self, keys, values, embeddings, lengths)
        self._settle()
        chunk_keys, chunk_values = (as_chunks(t[None] if t.dim() == 4 else t, self.chunk_size) for t in (keys, values))
        if self._storage is not None and not self._storage.fits(chunk_keys.shape):
            raise UserError(
                f"bank.insert: keys {tuple(keys.shape)} do not fit the stored ones (layers, heads or head size differ: "
                f"{tuple(self._storage.keys.shape)}). Fix: use one bank for one model."
            )
        self._allocate(chunk_keys.shape, keys.dtype, keys.device, embeddings.shape[-1], one_layer=keys.dim() == 4)
        embeddings, lengths, positions = (t.detach().cpu() for t in (embeddings.float(), lengths, positions))
        # A policy may refuse: then nothing has happened yet in any row.
        wanted = [int((lengths[row] > 0).sum()) for row in range(self.rows)]
        nothing = torch.empty(0, dtype=torch.long)
        drops = [
            self._drops(ledger, count) if evict else nothing
            for ledger, count in zip(self._ledgers, wanted, strict=True)
        ]
        self.evicted = []
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for row, ledger in enumerate(self._ledgers):
            if not wanted[row]:
                continue
            if len(drops[row]):
                self.evicted.append(ledger.entries.take(drops[row]))
                ledger.drop(drops[row])
                self.evictions += len(drops[row])
            real = lengths[row].nonzero().flatten()
            slots = ledger.append(embeddings[row, real], positions[row, real], lengths[row, real])
            targets.append((self._first + row) * self.slots + slots)
            sources.append(row * lengths.shape[1] + real)
            self.insertions += len(real)
        if targets:
            assert self._storage is not None
            self._storage.write(chunk_keys, chunk_values, torch.cat(sources), torch.cat(targets))

    def search(
        self, query: Tensor, top_k: int, before: Tensor | None = None, after: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The ``top_k`` most similar entries of each row.

        Args:
            query: (R, E), or (R, G, E) for several searches of each row.
            top_k: Entries wanted.
            before: (R,) only entries that end at or before this place in the document; None: all.
            after: (R,) only entries that begin at or after this place in the document; None: all.

        Returns:
            Scores (R, k) and entries (R, k), best first, -1 and NaN where a row has fewer; k <= top_k. (R, G, k) for
            several searches.
        """
        if query.dim() == 3:
            each = [self.search(query[:, g], top_k, before, after) for g in range(query.shape[1])]
            return _padded_stack([s for s, _ in each], float("nan")), _padded_stack([e for _, e in each], -1)
        check_embedding_size(self, query)
        query = query.detach().float().cpu()
        found = []
        for row, ledger in enumerate(self._ledgers):
            eligible = self._eligible(ledger, row, before, after)
            # Asking for as many more as are excluded stays exact; in training those are the window's own.
            scores, places = ledger.index.search(query[row], top_k + int((~eligible).sum()))
            keep = eligible[places]
            found.append((scores[keep][:top_k], places[keep][:top_k]))
        return self._stack([s for s, _ in found], float("nan")), self._stack([e for _, e in found], -1)

    def recent(self, top_k: int, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Entries (R, k) stored last, newest first: a control for retrieval."""
        return self._choose(top_k, before, after, lambda n, row: torch.arange(n - 1, -1, -1))

    def random(self, top_k: int, seeds: list[int], before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Entries (R, k) drawn without replacement, one seed a row: a control for retrieval."""
        return self._choose(
            top_k, before, after, lambda n, row: torch.randperm(n, generator=torch.Generator().manual_seed(seeds[row]))
        )

    def gather(self, entries: Tensor, scores: Tensor | None = None, count: bool = True) -> Retrieved | None:
        """Keys and values of entries (R, k), put back in document order; their counters go up by one.

        Entries (R, G, k) are G sets for each row; the record then has R * G rows, those of a row side by side.

        Returns:
            None if no row has anything to give.
        """
        groups = entries.shape[1] if entries.dim() == 3 else 1
        entries = entries.flatten(0, -2)
        scores = None if scores is None else scores.reshape(entries.shape)
        rows, k = entries.shape
        if self._storage is None or k == 0 or not bool((entries >= 0).any()):
            return None
        # Missing entries (-1) sort to the front, so that real ones stand right before the window.
        entries, order = entries.sort(dim=1)
        scores = torch.full((rows, k), float("nan")) if scores is None else scores.gather(1, order)
        slots = torch.zeros_like(entries)
        lengths = torch.zeros_like(entries)
        positions = torch.full_like(entries, -1)
        for row in range(rows):
            real = entries[row] >= 0
            chosen = entries[row][real]
            ledger = self._ledgers[row // groups]
            held = ledger.entries
            if count:
                ledger.retrieved(chosen, scores[row][real])
            slots[row, real] = (self._first + row // groups) * self.slots + held.slots[chosen]
            lengths[row, real], positions[row, real] = held.lengths[chosen], held.positions[chosen]
        mask = (torch.arange(self.chunk_size) < lengths[:, :, None]).flatten(1).to(self._storage.device)
        facts = {"mask": mask, "scores": scores, "entries": entries, "positions": positions}
        if self.storage == "device":
            keys, values = self._read(slots, lengths > 0)
            return Retrieved(keys, values, **facts)
        # Beside the model's lower layers, which do not need them.
        self._reader = self._reader or ThreadPoolExecutor(1, "memory-bank")
        self._pending = self._reader.submit(self._read, slots, lengths > 0)
        return Coming(self._pending, **facts)

    def _read(self, slots: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        assert self._storage is not None
        keys, values = self._storage.read(slots, real)
        return (keys[0], values[0]) if self._one_layer else (keys, values)

    def _settle(self) -> None:
        """Wait for what is still being read, before anything is written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def found_by(self, embeddings: Sequence[Tensor]) -> "MemoryBank":
        """The same entries found by other embeddings; keys and values are shared with this bank, not copied.

        For comparing encoders: neither of the two may be inserted into afterwards.

        Args:
            embeddings: Of each row (N, E), float32, in the order of its entries.
        """
        other = copy(self)
        other._ledgers = [ledger.found_by(e) for ledger, e in zip(self._ledgers, embeddings, strict=True)]
        return other

    def last_embeddings(self, count: int, before: Tensor) -> list[Tensor]:
        """For each row the embeddings (<= count, E) of the newest chunks that end at or before ``before`` (R,)."""
        return [held[-count:] for held in self.embeddings_within(before)]

    def embeddings_within(self, before: Tensor, after: Tensor | None = None) -> list[Tensor]:
        """For each row the embeddings (n, E) of the chunks that end at or before ``before`` (R,), from ``after`` on."""
        return [
            ledger.entries.embeddings[self._eligible(ledger, row, before, after)]
            for row, ledger in enumerate(self._ledgers)
        ]

    def ends(self) -> Tensor:
        """(R,) place in its document up to which each row was stored [tokens]."""
        return torch.tensor([ledger.end for ledger in self._ledgers] or [0] * self.rows)

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the rows marked in ``rows`` (R,) bool; None: all."""
        for row, ledger in enumerate(self._ledgers):
            if rows is None or bool(rows[row]):
                ledger.clear()

    def stats(self) -> dict[str, float]:
        """Totals over rows: entries, tokens, fill (share of capacity), insertions, evictions, never_retrieved."""
        held = [ledger.entries for ledger in self._ledgers]
        entries = sum(len(e) for e in held)
        tokens = sum(int(e.lengths.sum()) for e in held)
        return {
            "entries": entries,
            "tokens": tokens,
            "fill": tokens / (self.capacity * self.rows),
            "insertions": self.insertions,
            "evictions": self.evictions,
            "never_retrieved": sum(int((e.counters == 0).sum()) for e in held),
        }

    def entries(self, row: int) -> Entries:
        """What a row knows of its entries, oldest first."""
        return self._ledgers[row].entries

    def ages(self, row: int) -> Tensor:
        """(N,) insertions into a row since each of its entries was stored; 0 is the newest."""
        return self._ledgers[row].ages

    def rewrite(self, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> int:
        """Put keys and values back into those entries of a row that begin at ``positions``; nothing else changes.

        Args:
            row: Which row.
            keys: (H, T, D), or (L, H, T, D); before rotary embedding.
            values: Shaped as ``keys``.
            positions: (n,) where the chunks begin in the document.

        Returns:
            How many entries were written.
        """
        assert self._storage is not None
        self._settle()
        held = self.entries(row)
        chunk_keys, chunk_values = (
            as_chunks((t[None] if t.dim() == 3 else t)[:, None], self.chunk_size) for t in (keys, values)
        )
        match = positions[:, None] == held.positions[None]
        sources, places = match.nonzero(as_tuple=True)
        if len(sources):
            self._storage.write(
                chunk_keys, chunk_values, sources, (self._first + row) * self.slots + held.slots[places]
            )
        return len(sources)

    def _allocate(
        self, shape: torch.Size, given: torch.dtype, device: torch.device | str, embedding_size: int, one_layer: bool
    ) -> ChunkStorage:
        """Make room on the first insertion, when the shapes are known."""
        if self._storage is not None:
            return self._storage
        gpu = torch.device(device).type == "cuda" and has_gpu_index()
        ledgers = [Ledger(self.slots, embedding_size, self.index, gpu, self.half_life) for _ in range(self.rows)]
        slots, dtype = self.rows * self.slots, self.dtype or given
        self._storage = ChunkStorage(shape, slots, dtype, device, self.storage, self.storage_folder, given)
        self._ledgers, self._one_layer = ledgers, one_layer
        return self._storage

    def _drops(self, ledger: Ledger, count: int) -> Tensor:
        """Which entries have to go so that ``count`` more fit."""
        limit = self.capacity // self.chunk_size
        if len(ledger) + count <= limit:
            return torch.empty(0, dtype=torch.long)
        kept = torch.arange(len(ledger))
        while len(kept) + count > limit:
            held = ledger.entries.take(kept)
            facts = {"counters": held.counters, "scores": held.scores, "lengths": held.lengths}
            facts |= {"ages": ledger.ages[kept], "idle": ledger.idle[kept]}
            drop = self._policy({**facts, "capacity": self.capacity})
            if drop.dtype != torch.long or not len(drop) or int(drop.min()) < 0 or int(drop.max()) >= len(kept):
                raise UserError(
                    f"memory.policy: it returned {drop}. Allowed: a tensor of int64 with at least one index from 0 to "
                    f"{len(kept) - 1}. Fix: correct the policy; see lightning_memlong/bank/eviction.py."
                )
            stays = torch.ones(len(kept), dtype=torch.bool)
            stays[drop] = False
            kept = kept[stays]
        gone = torch.ones(len(ledger), dtype=torch.bool)
        gone[kept] = False
        return gone.nonzero().flatten()

    @staticmethod
    def _eligible(ledger: Ledger, row: int, before: Tensor | None, after: Tensor | None = None) -> Tensor:
        held = ledger.entries
        within = torch.ones(len(held), dtype=torch.bool)
        if before is not None:
            within &= held.positions + held.lengths <= int(before[row])
        if after is not None:
            within &= held.positions >= int(after[row])
        return within

    def _choose(self, top_k: int, before: Tensor | None, after: Tensor | None, order: Any) -> Tensor:
        chosen = []
        for row, ledger in enumerate(self._ledgers):
            places = self._eligible(ledger, row, before, after).nonzero().flatten()
            chosen.append(places[order(len(places), row)][:top_k])
        return self._stack(chosen, -1)

    def _stack(self, found: list[Tensor], missing: float) -> Tensor:
        if not found:  # nothing was ever inserted
            return torch.full((self.rows, 0), missing).to(torch.long if missing == -1 else torch.float)
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=missing)


def _padded_stack(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """G tensors (R, k_g) as (R, G, max k): approximate indexes do not always find as many."""
    widest = max(t.shape[1] for t in tensors)
    return torch.stack([F.pad(t, (0, widest - t.shape[1]), value=fill) for t in tensors], dim=1)
