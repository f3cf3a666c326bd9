"""Where a corpus is: its shards, by split if the source has splits of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.files import find_files
from datamodules.hub import hub_shards
from datamodules.records import Shard
from datamodules.sources import FileShard
from datamodules.splits import by_name
from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError

if TYPE_CHECKING:
    from datamodules.documents import DocumentDataModule


@dataclass
class Located:
    """The shards of a source."""

    where: str
    """For messages."""
    shards: dict[str, Sequence[Shard]]
    """By split; under 'all' if the documents are still to be divided."""
    on_hub: bool = False

    @property
    def undivided(self) -> bool:
        """Whether the source has no splits of its own."""
        return "all" in self.shards

    def of(self, part: str, how: str) -> Sequence[Shard]:
        """The shards of a split.

        Raises:
            UserError: If the source has no such split.
        """
        if self.undivided and how == "all" and part == "train":
            raise UserError(
                "data.split='all' puts every document in validation and test. Allowed for fit: auto, hash or folders. "
                "Fix: use it for validate and test only."
            )
        if self.undivided:
            return self.shards["all"]
        found = self.shards.get(part, ())
        if not found:
            there = ", ".join(name for name, shards in self.shards.items() if shards)
            raise UserError(
                f"data.split={how!r}: {self.where} has no {part} split. Allowed: {there}. Fix: name one of these with "
                f"--data.{part}_split, add one, or divide all documents with --data.split hash."
            )
        return found


def locate(data: DocumentDataModule) -> Located:
    """Find the shards of a DataModule's source.

    Raises:
        UserError: If there is no such source, or not the splits that were asked for.
    """
    path = data.path
    if path is None and (not data.hub_source.id or data.hub_source == data.hub):
        path = data.default_path() or path
    if path is None:
        return _on_the_hub(data)
    if isinstance(path, dict):
        return _by_split(data, path)
    paths = [path] if isinstance(path, str) else path
    files = [file for p in paths for file in _files(data, p)]
    where = ", ".join(paths)
    divided = by_name([file.name for file in files], data.source_splits)
    _tell_apart(files)
    if data.how in ("hash", "all") or (data.how == "auto" and not divided):
        return Located(where, {"all": files})
    if not divided:
        raise UserError(
            f"data.split='folders': {where} has neither folders train/ and validation/ nor files all named after a "
            "split. Allowed: such names. Fix: rename them, or give --data.path as {train: ..., validation: ...}, or "
            "use --data.split hash."
        )
    outside = len(files) - len({place for places in divided.values() for place in places})
    if outside:
        say(f"Data: {outside} files of {where} are in no split's folder and are not read", flush=True)
    return Located(where, {role: [files[i] for i in places] for role, places in divided.items()})


def _tell_apart(files: Sequence[FileShard]) -> None:
    """Give files of the same name, from several paths, names of their own: documents are known by them."""
    count = Counter(file.name for file in files)
    for file in files:
        if count[file.name] > 1:
            file.name = file.url


def _files(data: DocumentDataModule, path: str) -> list[FileShard]:
    return [f for f in find_files(path, data.extensions, data.columns, data.retries) if data.wanted(f.name)]


def _by_split(data: DocumentDataModule, path: dict[str, str | list[str]]) -> Located:
    unknown = sorted(set(path) - set(data.source_splits.values()))
    if unknown:
        allowed = ", ".join(data.source_splits.values())
        raise UserError(f"data.path: {', '.join(unknown)} is no split. Allowed: {allowed}. Fix: correct the name.")
    named = {role: path.get(name) for role, name in data.source_splits.items()}
    listed = {role: [paths] if isinstance(paths, str) else paths for role, paths in named.items() if paths}
    shards = {role: [f for p in paths for f in _files(data, p)] for role, paths in listed.items()}
    where = "; ".join(f"{role}: {', '.join(paths)}" for role, paths in listed.items())
    if data.how in ("hash", "all"):
        files = [file for role in shards for file in shards[role]]
        _tell_apart(files)
        return Located(where, {"all": files})
    for files in shards.values():
        _tell_apart(files)
    return Located(where, dict(shards))


def _on_the_hub(data: DocumentDataModule) -> Located:
    hub = data.hub_source
    there = hub.splits(data.retries, data.lines_are_rows)
    roles = {role: name for role, name in data.source_splits.items() if name in there}
    for role, name in data.source_splits.items():
        if name != role and name not in there:  # asked for by name
            raise UserError(
                f"data.{role}_split={name!r}: {hub.id} has no such split. Allowed: {', '.join(there)}. Fix: --data."
                f"{role}_split with one of these."
            )
    if data.how in ("hash", "all"):
        chosen = [("all", name) for name in there]
    elif data.how == "folders" or {"validation", "test"} & set(roles):
        chosen = list(roles.items())
    else:  # a training split alone, as of most corpora that nobody evaluates on
        chosen = [("all", roles.get("train") or next(iter(there)))]
    shards: dict[str, list[Shard]] = {}
    for role, name in chosen:
        found = hub_shards(hub, f"{hub.id}/{name}", there[name], data.columns, data.retries)
        shards.setdefault(role, []).extend(found)
    return Located(f"the hub data set {hub.id}", dict(shards), on_hub=True)
