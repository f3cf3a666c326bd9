"""What one bank row knows of its entries, apart from keys and values."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from lightning_memlong.bank.index import ChunkIndex, FlatIndex, make_index
from lightning_memlong.config import require


@dataclass
class Entries:
    """Facts about N entries, oldest first. One container, so that nothing can get out of step."""

    counters: Tensor
    """(N,) times retrieved, float64, or what counts as that by the attention it got; with a half-life, each time
    fades."""
    scores: Tensor
    """(N,) sum of the similarities it was retrieved with, each as much as it counts, float64; fades likewise."""
    born: Tensor
    """(N,) serial number of the insertion in this row."""
    used: Tensor
    """(N,) serial number of the newest insertion when it was last used; ``born`` if it never was."""
    positions: Tensor
    """(N,) place of the chunk's first token in its document [tokens]."""
    lengths: Tensor
    """(N,) real tokens of the chunk."""
    slots: Tensor
    """(N,) where its keys and values lie."""
    embeddings: Tensor
    """(N, E) unit vectors, float32."""

    @classmethod
    def none(cls, size: int) -> "Entries":
        """No entries, for embeddings of length ``size``."""
        real, whole = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.long)
        return cls(real, real, whole, whole, whole, whole, whole, torch.empty(0, size, dtype=torch.float32))

    def __len__(self) -> int:
        return len(self.counters)

    def take(self, which: Tensor | slice) -> "Entries":
        """The chosen entries, in their order."""
        return Entries(*(getattr(self, f.name)[which] for f in fields(self)))

    @classmethod
    def preallocated(cls, slots: int, size: int) -> "Entries":
        """Zeros for ``slots`` entries, to be written over, whatever mode PyTorch is in now and then."""
        with torch.inference_mode(False):
            like = cls.none(size)
            tensors = (getattr(like, f.name) for f in fields(like))
            return cls(*(t.new_zeros((slots, *t.shape[1:])) for t in tensors))

    def copy_from(self, start: int, other: "Entries") -> None:
        """Write another set of entries over this one, from ``start`` on."""
        for f in fields(self):
            getattr(self, f.name)[start : start + len(other)] = getattr(other, f.name)


class Loan(NamedTuple):
    """That somebody stores in a row for a while, and what the row was before."""

    writer: "ref[object]"
    serial: int
    end: int


class BankRow:
    """Entries of one document stream with slots for so many of them, and the index over their embeddings.

    Args:
        number: Which row of its bank it is, for messages.
        slots: Most entries the row can hold.
        index: FAISS ``index_factory`` string.
        half_life: Insertions after which a retrieval counts for half; None: it never fades.
    """

    def __init__(self, number: int, slots: int, index: str = "Flat", half_life: float | None = None) -> None:
        self.number, self.slots, self.half_life = number, slots, half_life
        self._factory, self._gpu_index = index, False
        self._buffer: Entries | None = None
        self.index: FlatIndex | ChunkIndex | None = None
        """Over the embeddings; None until :meth:`allocate`."""
        self._count = 0
        self._free = list(range(slots - 1, -1, -1))  # taken from the end: neighbours, lowest first
        self.serial = 0
        """Insertions so far."""
        self.end = 0
        """Place in the document up to which it was stored [tokens]."""
        self.tokens = torch.empty(0, dtype=torch.int32)
        """(T,) what was read, by place in the document, if anybody notes it."""
        self._loan: Loan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loan": None}  # who stores here does not in a copy

    def allocate(self, size: int, gpu_index: bool = False) -> None:
        """Make the buffers, now that embeddings are known to be of length ``size``."""
        self._gpu_index = gpu_index
        self._buffer = Entries.preallocated(self.slots, size)
        self.index = make_index(self._buffer.embeddings, self._factory, gpu_index)

    def __len__(self) -> int:
        return self._count

    @property
    def entries(self) -> Entries:
        """The live entries, oldest first; views, so counters may be changed in place."""
        return Entries.none(0) if self._buffer is None else self._buffer.take(slice(0, self._count))

    @property
    def ages(self) -> Tensor:
        """(N,) insertions since each entry was stored; 0 is the newest."""
        return self.serial - 1 - self.entries.born

    @property
    def idle(self) -> Tensor:
        """(N,) insertions since each entry was retrieved, or stored."""
        return self.serial - 1 - self.entries.used

    def eligible(self, before: int | None = None, after: int | None = None) -> Tensor:
        """(N,) bool: entries that end at or before one place in the document, and begin at or after another."""
        entries = self.entries
        within = torch.ones(len(entries), dtype=torch.bool)
        if before is not None:
            within &= entries.positions + entries.lengths <= before
        if after is not None:
            within &= entries.positions >= after
        return within

    def search(self, queries: Tensor, top_k: int, eligible: Tensor) -> tuple[Tensor, Tensor]:
        """The eligible entries most similar to each of some queries, in one search of the index.

        Args:
            queries: (Q, E).
            top_k: Entries wanted.
            eligible: (N,) bool.

        Returns:
            Scores (Q, k) and places (Q, k), best first, NaN and -1 where there are fewer.
        """
        if self.index is None:
            return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        # Asking for as many more as are excluded stays exact; in training those are the window's own.
        scores, places = self.index.search(queries, top_k + int((~eligible).sum()))
        left_out = places < 0
        if places.numel():  # of an empty row there is nothing to look at
            left_out |= ~eligible[places.clamp(min=0)]
        order = left_out.to(torch.uint8).argsort(dim=1, stable=True)[:, :top_k]
        scores, places, left_out = (t.gather(1, order) for t in (scores, places, left_out))
        widest = int((~left_out).sum(1).max()) if left_out.numel() else 0
        scores, places = scores.masked_fill(left_out, float("nan")), places.masked_fill(left_out, -1)
        return scores[:, :widest], places[:, :widest]

    def count_use(self, which: Tensor, use: Tensor, scores: Tensor) -> None:
        """Note how much entries were used, 1 for a retrieval, and the similarities they were found with (NaN: none)."""
        entries = self.entries
        entries.counters[which] += use.double()
        entries.scores[which] += use.double() * scores.double().nan_to_num(0.0)
        entries.used[which[use > 0]] = self.serial - 1

    def append(self, embeddings: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        """Add n entries for which there are free slots and return those (n,)."""
        count = len(lengths)
        assert self._buffer is not None and self.index is not None, "allocate first"
        assert count <= len(self._free), "no free slot: evict first"
        slots = torch.tensor([self._free.pop() for _ in range(count)], dtype=torch.long)
        born = torch.arange(self.serial, self.serial + count)
        if self.half_life is not None and self._loan is None:  # what is taken out again makes nothing fade
            entries = self.entries
            for faded in (entries.counters, entries.scores):
                faded *= 0.5 ** (count / self.half_life)
        nothing = torch.zeros(count, dtype=torch.float64)
        new = Entries(nothing, nothing, born, born, positions, lengths, slots, embeddings)
        self._buffer.copy_from(self._count, new)
        self._count += count
        self.serial += count
        self.end = int((positions + lengths).max())
        self.index.add(count)
        return slots

    def append_tokens(self, tokens: Tensor, place: int) -> None:
        """Note the (n,) tokens from ``place`` on, so that passages can be shown and reading goes on.

        Where those before them were not noted, nothing is.
        """
        if len(self.tokens) == place:
            self.tokens = torch.cat([self.tokens, tokens.to(torch.int32).cpu()])

    def drop(self, which: Tensor) -> None:
        """Remove entries by their places. Keys and values stay where they are; their slots become free."""
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[which] = False
        self._free = sorted([*self._free, *self.entries.slots[~keep].tolist()], reverse=True)
        self._replace(self.entries.take(keep))

    def restore(self, entries: Entries, serial: int, end: int, tokens: Tensor | None = None) -> None:
        """Hold exactly these entries, in slots 0..N-1; ``serial`` insertions were made, up to token ``end``."""
        entries = entries.take(slice(None))
        entries.slots = torch.arange(len(entries))
        self._free = list(range(self.slots - 1, len(entries) - 1, -1))
        self._replace(entries)
        self.serial, self.end = serial, end
        self.tokens = self.tokens if tokens is None else tokens

    def with_embeddings(self, embeddings: Tensor) -> "BankRow":
        """A copy whose entries have other embeddings (N, E)."""
        other = BankRow(self.number, self.slots, self._factory, self.half_life)
        other.allocate(embeddings.shape[1], self._gpu_index)
        entries = self.entries.take(slice(None))
        entries.embeddings = embeddings
        other._free, other.serial, other.end = list(self._free), self.serial, self.end
        other._replace(entries)
        return other

    def clear(self) -> None:
        """Forget everything."""
        self._free = list(range(self.slots - 1, -1, -1))
        self._count = self.serial = self.end = 0
        self.tokens, self._loan = self.tokens[:0], None
        if self.index is not None:
            self.index.reset()

    def grow(self, slots: int) -> None:
        """Have ``slots`` slots; the entries that are there stay in theirs."""
        entries = self.entries
        self._free = [*range(slots - 1, self.slots - 1, -1), *self._free]
        self.slots = slots
        if self._buffer is not None:
            self.allocate(entries.embeddings.shape[1], self._gpu_index)
            self._replace(entries)

    def _replace(self, entries: Entries) -> None:
        assert self._buffer is not None and self.index is not None, "allocate first"
        self._buffer.copy_from(0, entries)
        self._count = len(entries)
        self.index.rebuild(len(entries))

    # ---- taking back --------------------------------------------------------------------------------------

    def truncate(self, place: int) -> int:
        """Take out the chunks that reach beyond ``place`` [tokens]; gives where what is left ends."""
        entries = self.entries
        later = entries.positions + entries.lengths > place
        end = int(entries.positions[later].min()) if bool(later.any()) else place
        self._take_out(later, self.serial - int(later.sum()), end)
        return end

    def _take_out(self, later: Tensor, serial: int, end: int) -> None:
        if bool(later.any()):
            self.drop(later.nonzero().flatten())
        self.serial, self.end = serial, end
        self.entries.used.clamp_(max=max(0, serial - 1))
        self.tokens = self.tokens[:end]

    # ---- one writer at a time -----------------------------------------------------------------------------

    def acquire(self, writer: object) -> None:
        """Let somebody store here; until :meth:`release`, nobody else may.

        Raises:
            UserError: If another one does.
        """
        self.require_unlocked(writer)
        if self._loan is None:
            self._loan = Loan(ref(writer), self.serial, self.end)

    def release(self, writer: object | None) -> None:
        """Take out what a writer stored since :meth:`acquire`, and let others store; counters keep what they counted.

        Args:
            writer: Nothing happens if it does not store here; None: one that is gone without a word.
        """
        if (loan := self._loan) is not None and loan.writer() is writer:
            self._loan = None
            self._take_out(self.entries.born >= loan.serial, loan.serial, loan.end)

    def require_unlocked(self, writer: object | None = None) -> None:
        """Check that nobody but ``writer`` has a text here for a while.

        Raises:
            UserError: If somebody has.
        """
        self.release(None)
        allowed, fix = "one conversation at a time in a row", "close that conversation first"
        found = f"row {self.number} holds the text of an open conversation"
        require(self._loan is None or self._loan.writer() is writer, "memory", found, allowed, fix)
