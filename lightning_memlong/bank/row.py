"""What one bank row knows of its entries, apart from keys and values."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_memlong.bank.index import make_index


@dataclass
class Entries:
    """Facts about N entries, oldest first. One container, so that nothing can get out of step."""

    counters: Tensor
    """(N,) times retrieved, float64; with a half-life, each time fades."""
    scores: Tensor
    """(N,) sum of the similarities it was retrieved with, float64; fades likewise."""
    born: Tensor
    """(N,) serial number of the insertion in this row."""
    used: Tensor
    """(N,) serial number of the newest insertion when it was last retrieved; ``born`` if it never was."""
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
        return cls(real, real, whole, whole, whole, whole, whole, torch.empty(0, size))

    def __len__(self) -> int:
        return len(self.counters)

    def take(self, which: Tensor | slice) -> "Entries":
        """The chosen entries, in their order."""
        return Entries(*(getattr(self, f.name)[which] for f in fields(self)))

    def copy_from(self, start: int, other: "Entries") -> None:
        """Write another set of entries over this one, from ``start`` on."""
        for f in fields(self):
            getattr(self, f.name)[start : start + len(other)] = getattr(other, f.name)


class Ledger:
    """Entries of one row with room for ``slots`` of them, and the index over their embeddings.

    Args:
        slots: Most entries the row can hold.
        size: Length of an embedding.
        index: FAISS ``index_factory`` string.
        gpu_index: Keep the index on the GPU.
        half_life: Insertions after which a retrieval counts for half; None: it never fades.
    """

    def __init__(
        self, slots: int, size: int, index: str = "Flat", gpu_index: bool = False, half_life: float | None = None
    ) -> None:
        self.slots, self.half_life = slots, half_life
        self._index = index, gpu_index
        whole = Entries.none(size)
        self._room = Entries(*(getattr(whole, f.name).new_zeros((slots, *getattr(whole, f.name).shape[1:]))
                               for f in fields(whole)))  # fmt: skip
        self.index = make_index(self._room.embeddings, index, gpu_index)
        self._count = 0
        self._free = list(range(slots - 1, -1, -1))  # taken from the end: neighbours, lowest first
        self.serial = 0
        self.end = 0
        self.tokens = torch.empty(0, dtype=torch.int32)
        """What was read, by place in the document, if anybody notes it."""

    def __len__(self) -> int:
        return self._count

    @property
    def entries(self) -> Entries:
        """The live entries, oldest first; views, so counters may be changed in place."""
        return self._room.take(slice(0, self._count))

    @property
    def ages(self) -> Tensor:
        """(N,) insertions since each entry was stored; 0 is the newest."""
        return self.serial - 1 - self.entries.born

    @property
    def idle(self) -> Tensor:
        """(N,) insertions since each entry was retrieved, or stored."""
        return self.serial - 1 - self.entries.used

    def retrieved(self, which: Tensor, scores: Tensor) -> None:
        """Note that entries were retrieved, with these similarities (NaN: none)."""
        held = self.entries
        held.counters[which] += 1
        held.scores[which] += scores.double().nan_to_num(0.0)
        held.used[which] = self.serial - 1

    def append(self, embeddings: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        """Add n entries for which there is room and return their slots (n,)."""
        count = len(lengths)
        assert count <= len(self._free), "no room: evict first"
        slots = torch.tensor([self._free.pop() for _ in range(count)], dtype=torch.long)
        born = torch.arange(self.serial, self.serial + count)
        if self.half_life is not None:
            held = self.entries
            for faded in (held.counters, held.scores):
                faded *= 0.5 ** (count / self.half_life)
        nothing = torch.zeros(count, dtype=torch.float64)
        new = Entries(nothing, nothing, born, born, positions, lengths, slots, embeddings)
        self._room.copy_from(self._count, new)
        self._count += count
        self.serial += count
        self.end = int((positions + lengths).max())
        self.index.add(count)
        return slots

    def drop(self, which: Tensor) -> None:
        """Remove entries by their places. Keys and values stay where they are; their slots become free."""
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[which] = False
        self._free = sorted([*self._free, *self.entries.slots[~keep].tolist()], reverse=True)
        self._replace(self.entries.take(keep))

    def restore(self, entries: Entries, serial: int, end: int) -> None:
        """Hold exactly these entries, in slots 0..N-1; ``serial`` insertions were made, up to token ``end``."""
        entries = entries.take(slice(None))
        entries.slots = torch.arange(len(entries))
        self._free = list(range(self.slots - 1, len(entries) - 1, -1))
        self._replace(entries)
        self.serial, self.end = serial, end

    def found_by(self, embeddings: Tensor) -> "Ledger":
        """A copy whose entries have other embeddings (N, E)."""
        other = Ledger(self.slots, embeddings.shape[1], *self._index, self.half_life)
        entries = self.entries.take(slice(None))
        entries.embeddings = embeddings
        other._free, other.serial, other.end = list(self._free), self.serial, self.end
        other._replace(entries)
        return other

    def clear(self) -> None:
        """Forget everything."""
        self._free = list(range(self.slots - 1, -1, -1))
        self._count = self.serial = self.end = 0
        self.tokens = self.tokens[:0]
        self.index.reset()

    def grow(self, slots: int) -> None:
        """Have room for ``slots`` entries; those that are there stay in theirs."""
        held, old = self.entries, self._room
        self._room = Entries(*(getattr(old, f.name).new_zeros((slots, *getattr(old, f.name).shape[1:]))
                               for f in fields(old)))  # fmt: skip
        self._free = [*range(slots - 1, self.slots - 1, -1), *self._free]
        self.slots = slots
        self.index = make_index(self._room.embeddings, *self._index)
        self._replace(held)

    def _replace(self, entries: Entries) -> None:
        self._room.copy_from(0, entries)
        self._count = len(entries)
        self.index.rebuild(len(entries))
