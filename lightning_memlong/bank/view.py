"""Rows of a bank at work: insertion with eviction, search and gathering.

Legend: R rows, n chunks of a window, C tokens of a chunk, T = n * C, S slots a row, M = k * C retrieved tokens,
L stored layers, H key/value heads, D head size, E embedding size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.bank.checks import check_embedding_size
from lightning_memlong.bank.padding import padded, padded_stack
from lightning_memlong.bank.retrieved import PendingRetrieved, Retrieved
from lightning_memlong.bank.row import BankRow, Entries
from lightning_memlong.bank.state import state_of
from lightning_memlong.bank.store import BankStore
from lightning_memlong.text import sent


class BankView:
    """Some rows of a store, seen as a bank of R rows; what is stored through a view is stored for all.

    Args:
        store: What the rows share.
        numbers: Which of its rows.
    """

    def __init__(self, store: BankStore, numbers: Sequence[int]) -> None:
        self._store, self._numbers = store, list(numbers)

    @property
    def _rows(self) -> list[BankRow]:
        return [self._store.rows[number] for number in self._numbers]

    @property
    def rows(self) -> int:
        """Document streams (batch rows), R."""
        return len(self._numbers)

    @property
    def chunk_size(self) -> int:
        """Tokens of an entry, C."""
        return self._store.chunk_size

    @property
    def capacity(self) -> int:
        """Size of a row [tokens]."""
        return self._store.capacity

    @property
    def slots(self) -> int:
        """Chunks a row has room for; more than the capacity only while a conversation stores in it."""
        return self._store.slots

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is ever evicted, so that there must be room for all."""
        return self._store.keeps_everything

    @property
    def insertions(self) -> int:
        """Entries stored so far, in all rows of the bank."""
        return self._store.insertions

    @property
    def evictions(self) -> int:
        """Entries dropped so far, in all rows of the bank."""
        return self._store.evictions

    @property
    def evicted(self) -> list[Entries]:
        """What the last insertion dropped, of each row where it dropped something; for observers."""
        return self._store.evicted

    def view(self, row: int) -> "BankView":
        """A bank of one row, which is row ``row`` of this one."""
        return BankView(self._store, [self._numbers[row]])

    def rolled(self, by: int) -> "BankView":
        """The same rows in another order: row r of it is row r + ``by`` of this one, going round."""
        return BankView(self._store, [self._numbers[(row + by) % self.rows] for row in range(self.rows)])

    def row(self, row: int) -> BankRow:
        """A row itself: what was read into it, taking back what was stored, one writer at a time."""
        return self._rows[row]

    # ---- insertion ----------------------------------------------------------------------------------------

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
            keys: (R, H, T, D), or (L, R, H, T, D) for several layers; before rotary embedding. On a GPU they may be
                on their way to the host or the disk when this returns: nobody may change them afterwards.
            values: Shaped as ``keys``.
            embeddings: (R, n, E) unit vectors.
            lengths: (R, n) real tokens of each chunk; a chunk of length 0 is not stored.
            positions: (R, n) place of each chunk's first token in its document.
            evict: False where :meth:`reserve` has made room, beyond the capacity if need be.

        Raises:
            UserError: If a shape does not fit the bank, a window has more chunks than a row has room for, or something
                is not finite; the bank is then as it was.
        """
        self._store.insert(self._numbers, keys, values, embeddings, lengths, positions, evict)

    def overwrite(self, row: int, keys: Tensor, values: Tensor, positions: Tensor) -> int:
        """Put keys and values back into those entries of a row that begin at ``positions``; nothing else changes.

        Args:
            row: Which row.
            keys: (H, T, D), or (L, H, T, D); before rotary embedding.
            values: Shaped as ``keys``.
            positions: (n,) where the chunks begin in the document.

        Returns:
            How many entries were written.
        """
        return self._store.overwrite(self._numbers[row], keys, values, positions)

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the rows marked in ``rows`` (R,) bool; None: all."""
        for number, row in enumerate(self._rows):
            if rows is None or bool(rows[number]):
                row.clear()

    def reserve(self, row: int, chunks: int) -> None:
        """Have room for so many more chunks in a row, evicting nothing; a bank that evicts keeps its capacity.

        Raises:
            UserError: As :meth:`MemoryBank.grow`.
        """
        self._store.reserve(self._numbers[row], chunks)

    # ---- search -------------------------------------------------------------------------------------------

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
        check_embedding_size(query, self._store.embedding_size)
        queries = query.detach().float().cpu()
        queries = queries[:, None] if query.dim() == 2 else queries
        eligible = self._eligible(before, after)
        found = [row.search(queries[i], top_k, eligible[i]) for i, row in enumerate(self._rows)]
        scores = padded_stack([scores for scores, _ in found], float("nan"))
        entries = padded_stack([places for _, places in found], -1)
        return (scores[:, 0], entries[:, 0]) if query.dim() == 2 else (scores, entries)

    def recent(self, top_k: int, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Entries (R, k) stored last, newest first: a control for retrieval."""
        return self._choose(top_k, before, after, lambda n, row: torch.arange(n - 1, -1, -1))

    def random(self, top_k: int, seeds: list[int], before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Entries (R, k) drawn without replacement, one seed a row: a control for retrieval."""
        return self._choose(
            top_k, before, after, lambda n, row: torch.randperm(n, generator=torch.Generator().manual_seed(seeds[row]))
        )

    def _choose(
        self, top_k: int, before: Tensor | None, after: Tensor | None, order: Callable[[int, int], Tensor]
    ) -> Tensor:
        chosen = []
        for row, eligible in enumerate(self._eligible(before, after)):
            places = eligible.nonzero().flatten()
            chosen.append(places[order(len(places), row)][:top_k])
        return padded(chosen, -1)

    def _eligible(self, before: Tensor | None, after: Tensor | None) -> list[Tensor]:
        until, since = ([None] * self.rows if t is None else t.tolist() for t in (before, after))
        return [row.eligible(*within) for row, within in zip(self._rows, zip(until, since, strict=True), strict=True)]

    # ---- gathering ----------------------------------------------------------------------------------------

    def gather(self, entries: Tensor, scores: Tensor | None = None, count: bool = True) -> Retrieved | None:
        """Keys and values of entries (R, k), put back in document order; their counters go up by one.

        Entries (R, G, k) are G sets for each row; the record then has R * G rows, those of a row side by side.

        Returns:
            None if no row has anything to give.
        """
        store, groups = self._store, entries.shape[1] if entries.dim() == 3 else 1
        entries = entries.flatten(0, -2)
        scores = None if scores is None else scores.reshape(entries.shape)
        rows, k = entries.shape
        if store.storage is None or k == 0 or not bool((entries >= 0).any()):
            return None
        # Missing entries (-1) sort to the front, so that real ones stand right before the window.
        entries, order = entries.sort(dim=1)
        scores = torch.full((rows, k), float("nan")) if scores is None else scores.gather(1, order)
        slots = torch.zeros_like(entries)
        lengths = torch.zeros_like(entries)
        positions = torch.full_like(entries, -1)
        for i in range(rows):
            real, number = entries[i] >= 0, self._numbers[i // groups]
            row, chosen = store.rows[number], entries[i][real]
            facts = row.entries
            if count:
                row.count_use(chosen, torch.ones(len(chosen)), scores[i][real])
            slots[i, real] = number * store.slots + facts.slots[chosen]
            lengths[i, real], positions[i, real] = facts.lengths[chosen], facts.positions[chosen]
        mask = (torch.arange(self.chunk_size) < lengths[:, :, None]).flatten(1)
        known: dict[str, Any] = {"scores": scores, "entries": entries, "positions": positions}
        known["mask"], full = sent(mask, store.storage.device), bool(mask.all())
        if store.where == "device":
            keys, values = store.read(slots, lengths > 0)
            return Retrieved(keys, values, **known, empty=False, full=full)
        pending = store.read_ahead(slots, lengths > 0)
        return PendingRetrieved(pending, store.one_layer, **known, empty=False, full=full)

    def count_use(self, entries: Tensor, use: Tensor, scores: Tensor) -> None:
        """Let the counters of a record's entries go up by their shares of its use, instead of 1 each.

        What a row uses of its own, whatever that is, is shared out: the counters of its n entries go up by n in all.
        One that was not used at all counts nothing.

        Args:
            entries: (R * G, k) as in :class:`Retrieved`; -1 counts nothing.
            use: (R * G, k) how much each was used, in any unit.
            scores: (R * G, k) similarities; NaN: none.
        """
        use, groups = use.detach().double().cpu(), len(entries) // self.rows
        for i, places in enumerate(entries):
            real = places >= 0
            own = use[i][real]
            if float(own.sum()) > 0:
                row = self._store.rows[self._numbers[i // groups]]
                row.count_use(places[real], own * len(own) / own.sum(), scores[i][real])

    # ---- what is known of entries -------------------------------------------------------------------------

    def last_embeddings(self, count: int, before: Tensor) -> list[Tensor]:
        """For each row the embeddings (<= count, E) of the newest chunks that end at or before ``before`` (R,)."""
        found = []
        for row, eligible in zip(self._rows, self._eligible(before, None), strict=True):
            newest = eligible.nonzero().flatten()[-count:]  # by place: a mask would copy all embeddings of the row
            found.append(row.entries.embeddings[newest])
        return found

    def embeddings_within(self, before: Tensor, after: Tensor | None = None) -> list[Tensor]:
        """For each row the embeddings (n, E) of the chunks that end at or before ``before`` (R,), from ``after`` on."""
        eligible = self._eligible(before, after)
        return [row.entries.embeddings[which] for row, which in zip(self._rows, eligible, strict=True)]

    def entries(self, row: int) -> Entries:
        """What a row knows of its entries, oldest first."""
        return self._rows[row].entries

    def ages(self, row: int) -> Tensor:
        """(N,) insertions into a row since each of its entries was stored; 0 is the newest."""
        return self._rows[row].ages

    def ends(self) -> Tensor:
        """(R,) place in its document up to which each row was stored [tokens]."""
        return torch.tensor([row.end for row in self._rows])

    def state_dict(self, keys_values: bool = True) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors trimmed to what is filled, on the CPU.

        Args:
            keys_values: False leaves keys and values out; :meth:`overwrite` puts them back after loading.
        """
        return state_of(self._store, self._numbers, keys_values)

    def stats(self) -> dict[str, float]:
        """Totals over rows: entries, tokens, fill (share of capacity), insertions, evictions, never_retrieved."""
        held = [row.entries for row in self._rows]
        tokens = sum(int(e.lengths.sum()) for e in held)
        return {
            "entries": sum(len(e) for e in held),
            "tokens": tokens,
            "fill": tokens / (self.capacity * self.rows),
            "insertions": self.insertions,
            "evictions": self.evictions,
            "never_retrieved": sum(int((e.counters == 0).sum()) for e in held),
        }
