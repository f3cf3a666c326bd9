"""The same text twice: a file is read once; documents that are equal are told, and never on both sides of a split."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import Any

from datamodules.formats import COMPRESSION
from datamodules.network import UNREADABLE
from datamodules.records import Shard
from datamodules.sources import FileShard
from datamodules.splits import by_hash, some
from datamodules.walk import PassedOver
from lightning_memlong.distributed import say


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


def divide_equal_texts(names: Sequence[str], marks: Sequence[str], fraction: float) -> dict[str, list[int]]:
    """Places of documents by split, by a hash of their names; those of equal text go with the first of them.

    Args:
        names: What documents are called.
        marks: Of each, a digest of its text.
        fraction: Share of validation, and of test.
    """
    equal: dict[str, list[int]] = {}
    for i, mark in enumerate(marks):
        equal.setdefault(mark, []).append(i)
    groups = list(equal.values())
    parts = by_hash([names[group[0]] for group in groups], fraction)
    return {role: sorted(i for place in places for i in groups[place]) for role, places in parts.items()}


def keep_texts_apart(streams: Mapping[str, Any], tell_only: bool) -> None:
    """Leave out of tokenised training what another split holds too; say what is equal, within a split and between two.

    Args:
        streams: By split, those that are open.
        tell_only: Whether splits were given one by one: then they stay as they are, as where nothing would be left.
    """
    own = {part: _documents(stream) for part, stream in streams.items() if hasattr(stream, "cache")}
    for part, documents in own.items():
        if again := [name for names in documents.values() for name in names[1:]]:
            say(f"Data: {part} holds {some(again)} equal to other documents of it, and reads them all", flush=True)
    shared = {mark for mark in own.pop("train", {}) if any(mark in documents for documents in own.values())}
    if not shared:
        return
    train = streams["train"]
    kept = [i for i in train.documents if train.cache.marks[i] not in shared]
    names = [train.cache.ids[i] for i in train.documents if train.cache.marks[i] in shared]
    if _tell_shared(names, len(train.documents), tell_only):
        train.documents = kept


def keep_files_apart(shards: Mapping[str, Sequence[Shard]], tell_only: bool) -> dict[str, Sequence[Shard]]:
    """The shards of all splits, with training's files left out that another split holds too.

    Nothing is known of their documents yet. Only files on this machine of equal size are read for it.

    Args:
        shards: By split.
        tell_only: As for :func:`keep_texts_apart`.
    """
    sizes = {
        part: {
            file: os.path.getsize(file.url) for file in found if isinstance(file, FileShard) and "://" not in file.url
        }
        for part, found in shards.items()
    }
    train = sizes.pop("train", {})
    own = set(train.values())
    others = {file: size for of_split in sizes.values() for file, size in of_split.items() if size in own}
    same_size, contents = set(others.values()), {_content(file) for file in others}
    shared = {file for file, size in train.items() if size in same_size and _content(file) in contents}
    left_out = _tell_shared([file.name for file in train if file in shared], len(shards.get("train", ())), tell_only)
    return {part: [s for s in found if not (left_out and s in shared)] for part, found in shards.items()}


def _tell_shared(names: Sequence[str], of: int, tell_only: bool) -> bool:
    """Say which texts of training another split holds too, and give whether they are to be left out."""
    if names and (tell_only or len(names) == of):
        why = "that is how data.path names them" if tell_only else "nothing else is left to train on"
        say(f"Data: WARNING: {some(names)} of train are also in another split, whose results they make too good; {why}",
            flush=True)  # fmt: skip
        return False
    if names:
        say(f"Data: {some(names)} of train are also in another split and are not trained on", flush=True)
    return bool(names)


def _content(file: FileShard) -> str:
    return file.identity(content=True).removeprefix(file.name)


def _documents(stream: Any) -> dict[str, list[str]]:
    """Names of a split's documents, by digest of their text."""
    found: dict[str, list[str]] = {}
    for i in stream.documents:
        found.setdefault(stream.cache.marks[i], []).append(stream.cache.ids[i])
    return found
