"""The same text twice: a file is read once; documents that are equal are told, and never on both sides of a split."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import Any

from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError

from .corpus import Corpus
from .formats import COMPRESSION, printable
from .network import UNREADABLE
from .records import Document, Shard
from .sources import FileShard
from .splits import some
from .walk import PassedOver


def each_file_once(files: Sequence[FileShard], passed: PassedOver) -> list[FileShard]:
    """The files without links to others of them, and without compressed copies that lie beside what they hold.

    Of a file and a link to it, the file's own name stays.
    """
    chosen: dict[str, FileShard] = {}
    for file in sorted(files, key=_is_link):  # in order of their names otherwise
        if chosen.setdefault(_place(file), file) is not file:
            passed.twice.append(file.name)
    kept = [file for file in files if chosen[_place(file)] is file]
    plain = {file.url: file for file in kept if file.compression is None}
    copies = [f for f in kept if (one := plain.get(_unpacked(f.url))) is not None and _same_content(f, one)]
    passed.twice += [file.name for file in copies]
    return [file for file in kept if file not in copies]


def _place(file: FileShard) -> str:
    return file.url if "://" in file.url else os.path.realpath(file.url)


def _is_link(file: FileShard) -> bool:
    return "://" not in file.url and not os.path.realpath(file.url).endswith(file.name)


def _unpacked(url: str) -> str:
    return (
        url[: -len(PurePosixPath(url).suffix)] if "://" not in url and url.lower().endswith(tuple(COMPRESSION)) else ""
    )


def _same_content(a: FileShard, b: FileShard) -> bool:
    with ExitStack() as stack:
        try:
            one, other = a.open(stack), b.open(stack)
            while (part := one.read(1 << 20)) == other.read(1 << 20):
                if not part:
                    return True
        except UNREADABLE:  # one that is damaged is told when it is read
            return False
    return False


class HeldOut:
    """Texts that validation or test holds: training leaves them out, or only warns of them.

    Args:
        digests: Of the texts (:meth:`~datamodules.records.Document.digest`).
        warn_only: Whether splits were given one by one, which stay as they are.
    """

    def __init__(self, digests: Collection[str], warn_only: bool) -> None:
        self.digests, self.warn_only = set(digests), warn_only
        self._met: dict[str, None] = {}

    def identity(self) -> tuple[str, ...]:
        """What training's order of documents depends on."""
        return () if self.warn_only else tuple(sorted(self.digests))

    def keeps(self, document: Document) -> bool:
        """Whether a document that streams by is trained on; says so of the first that is held out."""
        if document.problem is not None or document.digest() not in self.digests:
            return True
        if not self._met:
            self._say(printable(document.id), "; others are not named")
        self._met[document.id] = None
        return self.warn_only

    def words(self) -> str:
        """How many documents were met that are held out, if they are left out."""
        return f"{len(self._met)} that are also in another split" if self._met and not self.warn_only else ""

    def divide(self, names: Sequence[str], digests: Sequence[str]) -> list[bool]:
        """Which documents are trained on; says which are held out.

        Raises:
            UserError: If there is no other.
        """
        held = [digest in self.digests for digest in digests]
        if any(held):
            self._say(some([name for name, out in zip(names, held, strict=True) if out]), "")
        if all(held) and not self.warn_only:
            raise UserError(
                f"data.path: all {len(names)} documents of train are also in another split. Allowed: at least one that "
                "is not. Fix: add text to train, or name the splits one by one (--data.path {train: ..., validation: "
                "...}), which are read as they are."
            )
        return [self.warn_only or not out for out in held]

    def _say(self, names: str, others: str) -> None:
        if self.warn_only:
            say(f"Data: WARNING: {names} of train also in another split, whose results they make too good{others}; "
                "that is how data.path names them", flush=True)  # fmt: skip
        else:
            say(f"Data: {names} of train also in another split and not trained on{others}", flush=True)


def find_held_out(corpus: Corpus, shards: Mapping[str, Sequence[Shard]], warn_only: bool) -> HeldOut:
    """What validation and test hold; only splits on this machine are read for it.

    Args:
        corpus: What its documents are.
        shards: By split.
        warn_only: As for :class:`HeldOut`.
    """
    digests: set[str] = set()
    for part, found in shards.items():
        if part == "train" or not on_this_machine(found):
            continue
        try:
            documents = (d for index in range(len(found)) for d in corpus.documents(found, index))
            digests |= {d.digest() for d in documents if d.problem is None}
        except UserError as error:  # of a split that is perhaps never used
            say(f"Data: documents of {part} are not looked for in train: {error}", flush=True)
    return HeldOut(digests, warn_only)


def on_this_machine(shards: Sequence[Shard]) -> bool:
    """Whether all of these are files here."""
    return all(isinstance(shard, FileShard) and "://" not in shard.url for shard in shards)


def keep_apart(streams: Mapping[str, Any], held_out: HeldOut) -> None:
    """Leave out of tokenised training what is held out, and what another tokenised split holds.

    Args:
        streams: By split, those that are open.
        held_out: What is known of texts that were not tokenised.

    Raises:
        UserError: If nothing is left to train on.
    """
    train: Any = streams.get("train")
    if not hasattr(train, "cache"):  # documents that stream are told apart as they come
        return
    for part, stream in streams.items():
        if part != "train" and hasattr(stream, "cache"):
            held_out.digests.update(_documents(stream))
    names, digests = ([column[i] for i in train.documents] for column in (train.cache.ids, train.cache.marks))
    train.documents = [i for i, kept in zip(train.documents, held_out.divide(names, digests), strict=True) if kept]


def tell_equal_texts(streams: Mapping[str, Any]) -> None:
    """Say which tokenised documents of a split are equal to others of it."""
    for part, stream in streams.items():
        documents = _documents(stream) if hasattr(stream, "cache") else {}
        if again := [name for names in documents.values() for name in names[1:]]:
            say(f"Data: {part} holds {some(again)} equal to other documents of it, and reads them all", flush=True)


def _documents(stream: Any) -> dict[str, list[str]]:
    """Names of a split's documents, by digest of their text."""
    found: dict[str, list[str]] = {}
    for i in stream.documents:
        found.setdefault(stream.cache.marks[i], []).append(stream.cache.ids[i])
    return found
