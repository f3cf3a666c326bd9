"""In which order an epoch reads its documents, and how to go on from any place in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from datamodules.token_cache import Document


@dataclass(frozen=True)
class Corpus:
    """The documents of a split, by shard."""

    name: str
    """For messages."""
    shards: tuple[str, ...]
    """What its shards are called."""
    read: Callable[[int, int], Iterator[Document]]
    """Documents of a shard (by number) from a row on, in order."""
    digest: str
    """What identifies the text."""


@dataclass(frozen=True)
class Drawn:
    """A document in the order of an epoch, and how to go on after it."""

    document: Document
    block: int
    """Number of its block in the epoch."""
    begin: tuple[int, int]
    """Where the block begins: place in the epoch's order of shards, row."""
    taken: int
    """Documents of the block up to and with this one."""
    count: int
    """Documents of the epoch up to and with this one, all ranks together."""


def order(
    corpus: Corpus, epoch: int, seed: int | None, buffer: int, after: tuple[int, tuple[int, int], int, int]
) -> Iterator[Drawn]:
    """All documents of an epoch, from a place on.

    The shards are shuffled; then ``buffer`` documents at a time are read and come out in random order. Unlike a
    buffer that is refilled one by one, a block can be read again when a run is resumed.

    Args:
        corpus: What to read.
        epoch: Which epoch.
        seed: None keeps the order of the source.
        buffer: Documents of a block.
        after: (block, where it begins, documents taken from it, documents taken in all).
    """
    number, begin, taken, count = after
    shards = list(range(len(corpus.shards)))
    if seed is not None:
        shards = torch.randperm(len(shards), generator=_mixer(seed, epoch, -1)).tolist()
    block: list[Document] = []

    def shuffled() -> Iterator[Drawn]:
        nonlocal count
        places = list(range(len(block)))
        if seed is not None:
            places = torch.randperm(len(block), generator=_mixer(seed, epoch, number)).tolist()
        for i, place in enumerate(places, 1):
            if i > taken:
                count += 1
                yield Drawn(block[place], number, begin, i, count)

    for at in range(begin[0], len(shards)):
        for document in corpus.read(shards[at], begin[1] if at == begin[0] else 0):
            if len(block) == buffer:
                yield from shuffled()
                block, number, begin, taken = [], number + 1, (at, document.place[1]), 0
            block.append(document)
    yield from shuffled()


def _mixer(seed: int, epoch: int, block: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + block + 1) % 2**63)
