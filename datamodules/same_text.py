"""The same text twice: a file is read once, and documents that are equal are told and never divided."""

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


def tell_equal_texts(streams: Mapping[str, Any]) -> None:
    """Say which documents of tokenised splits are equal, within one and between two."""
    own = {part: _documents(stream) for part, stream in streams.items() if hasattr(stream, "cache")}
    for part, documents in own.items():
        if again := [name for names in documents.values() for name in names[1:]]:
            say(f"Data: {part} holds {some(again)} equal to other documents of it, and reads them all", flush=True)
    for part in ("validation", "test"):
        if shared := [own["train"][mark][0] for mark in own.get("train", {}) if mark in own.get(part, {})]:
            say(f"Data: WARNING: {some(shared)} of train are also in {part}, whose results they make too good",
                flush=True)  # fmt: skip


def tell_equal_files(shards: Mapping[str, Sequence[Shard]]) -> None:
    """Say which files of training are also in another split, while nothing is known of their documents.

    Only files of equal size are read for it.
    """
    local = {
        part: [s for s in found if isinstance(s, FileShard) and "://" not in s.url] for part, found in shards.items()
    }
    sizes = {part: {os.path.getsize(file.url) for file in files} for part, files in local.items()}
    for part in ("validation", "test"):
        both = sizes.get("train", set()) & sizes.get(part, set())
        known = {_content(file) for file in local.get(part, ()) if os.path.getsize(file.url) in both}
        if shared := [f.name for f in local["train"] if os.path.getsize(f.url) in both and _content(f) in known]:
            say(f"Data: WARNING: {some(shared)} of train are also in {part}, whose results they make too good",
                flush=True)  # fmt: skip


def _content(file: FileShard) -> str:
    return file.identity(content=True).removeprefix(file.name)


def _documents(stream: Any) -> dict[str, list[str]]:
    """Names of a split's documents, by digest of their text."""
    found: dict[str, list[str]] = {}
    for i in stream.documents:
        found.setdefault(stream.cache.marks[i], []).append(stream.cache.ids[i])
    return found
