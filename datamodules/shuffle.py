"""In which order an epoch reads its documents, and how to go on from any place in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .records import Document
from .same_text import HeldOut


@dataclass(frozen=True)
class SplitDocuments:
    """The documents of a split, by shard."""

    name: str
    """For messages."""
    shards: tuple[str, ...]
    """What its shards are called."""
    read: Callable[[int, int], Iterator[Document]]
    """Documents of a shard (by number) from a row on, in order."""
    digest: str
    """What identifies the text."""
    held_out: HeldOut | None = None
    """What `read` leaves out."""


class EpochPosition(NamedTuple):
    """A place between two documents of an epoch, from which it can go on."""

    block: int = 0
    """Number of the block in the epoch."""
    begin: tuple[int, int] = (0, 0)
    """Where the block begins: place in the epoch's order of shards, row."""
    taken: int = 0
    """Documents of the block before this place."""
    drawn: int = 0
    """Documents of the epoch before this place, all ranks together."""


@dataclass(frozen=True)
class Sample:
    """A document as it is drawn in an epoch."""

    document: Document
    after: EpochPosition
    """The place after it."""


def draw_samples(
    documents: SplitDocuments, epoch: int, seed: int | None, buffer: int, start: EpochPosition
) -> Iterator[Sample]:
    """All documents of an epoch, from a place on.

    The shards are shuffled; then ``buffer`` documents at a time are read and come out in random order. Unlike a
    buffer that is refilled one by one, a block can be read again when a run is resumed.

    Args:
        documents: What to read.
        epoch: Which epoch.
        seed: None keeps the order of the source.
        buffer: Documents of a block.
        start: Where to begin.
    """
    number, begin, taken, count = start
    shards = list(range(len(documents.shards)))
    if seed is not None:
        shards = torch.randperm(len(shards), generator=_mixer(seed, epoch, -1)).tolist()
    block: list[Document] = []

    def shuffled() -> Iterator[Sample]:
        nonlocal count
        places = list(range(len(block)))
        if seed is not None:
            places = torch.randperm(len(block), generator=_mixer(seed, epoch, number)).tolist()
        for i, place in enumerate(places, 1):
            if i > taken:
                count += 1
                yield Sample(block[place], EpochPosition(number, begin, i, count))

    for at in range(begin[0], len(shards)):
        for document in documents.read(shards[at], begin[1] if at == begin[0] else 0):
            if len(block) == buffer:
                yield from shuffled()
                block, number, begin, taken = [], number + 1, (at, document.place[1]), 0
            block.append(document)
    yield from shuffled()


def _mixer(seed: int, epoch: int, block: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + block + 1) % 2**63)
