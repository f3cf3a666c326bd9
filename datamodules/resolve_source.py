"""Where a corpus is: its shards, by split if the source has splits of its own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError

from .corpus import Corpus
from .files import find_files
from .formats import printable
from .hub import hub_shards
from .records import Shard
from .same_text import HeldOut, each_file_once
from .settings import DataSettings
from .sources import FileShard
from .splits import by_name, some, split_words
from .walk import PassedOver


@dataclass
class Source:
    """The shards of a source."""

    where: str
    """For messages."""
    shards: dict[str, Sequence[Shard]]
    """By split; under 'all' if the documents are still to be divided."""
    on_hub: bool = False
    held_out: HeldOut | None = None
    """What training leaves out, once it is opened."""

    @property
    def undivided(self) -> bool:
        """Whether the source has no splits of its own."""
        return "all" in self.shards

    def shards_of(self, part: str, split: str) -> Sequence[Shard]:
        """The shards of a split, or all of them if they are still to be divided.

        Raises:
            UserError: If the source has no such split.
        """
        if self.undivided and split == "all" and part == "train":
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
                f"data.split={split!r}: {self.where} has no {part} split. Allowed: {there}. Fix: name one of these "
                f"with --data.{part}_split, add one, or divide all documents with --data.split hash."
            )
        return found


def resolve_source(settings: DataSettings, corpus: Corpus) -> Source:
    """Find the shards of a corpus where its settings say they are.

    Args:
        settings: Which path or data set, and how it is split.
        corpus: Which files belong to it, and where it is if the settings do not say.

    Raises:
        UserError: If there is no such source, or not the splits that were asked for.
    """
    path = settings.path
    if path is None and (not settings.hub.id or settings.hub == corpus.hub):
        path = corpus.default_path() or path
    if path is None:
        return _resolve_hub(settings, corpus)
    if isinstance(path, dict):
        return _resolve_by_split(settings, corpus, path)
    return _resolve_files(settings, corpus, [path] if isinstance(path, str) else path)


def _resolve_files(settings: DataSettings, corpus: Corpus, paths: list[str]) -> Source:
    files, where = _corpus_files(settings, corpus, paths), ", ".join(paths)
    names = [file.name for file in files]
    divided, unused = by_name(names, settings.split_names, ask=settings.split == "folders")
    _name_apart(files)
    if settings.split in ("hash", "all") or (settings.split == "auto" and not divided):
        own = unused or [names[i] for i in sorted({i for places in divided.values() for i in places})]
        _tell_unused(settings, where, own)
        return Source(where, {"all": files})
    if not divided:
        raise UserError(
            f"data.split='folders': {where} has neither folders nor files named after a split. Allowed: names such as "
            "train/ and validation/, at one level of folders. Fix: rename them, or give --data.path as {train: ..., "
            "validation: ...}, or use --data.split hash."
        )
    outside = sorted(set(range(len(files))) - {place for places in divided.values() for place in places})
    if outside:
        say(f"Data: {some([names[i] for i in outside])} of {where} are in no split and are not read", flush=True)
    return Source(where, {role: [files[i] for i in places] for role, places in divided.items()})


def _tell_unused(settings: DataSettings, where: str, names: Sequence[str]) -> None:
    """Say that names of splits do not divide the text, where a path was given; the default has none."""
    if names and settings.path is not None:
        how = "documents are divided by a hash of their texts" if settings.split != "all" else "all documents are read"
        say(f"Data: {some(names)} of {where}: named like splits and not used as such (data.split {settings.split}); "
            f"{how}", flush=True)  # fmt: skip


def _name_apart(files: Sequence[FileShard]) -> None:
    """Give files of the same name, from several paths, names of their own: documents are known by them."""
    count = Counter(file.name for file in files)
    for file in files:
        if count[file.name] > 1:
            file.name = printable(file.url)


def _corpus_files(settings: DataSettings, corpus: Corpus, paths: Sequence[str]) -> list[FileShard]:
    """The corpus's files behind some paths, each of them once; says what is passed over."""
    passed = PassedOver()
    how = (settings.extensions, corpus.columns, settings.retries, passed, settings.timeout_s)
    found = [file for path in paths for file in find_files(path, *how)]
    files = each_file_once([file for file in found if corpus.wanted(file.name)], passed)
    if settings.path is not None and (words := passed.words()):
        say(f"Data: not read of {', '.join(paths)}: {words}", flush=True)
    return files


def _resolve_by_split(settings: DataSettings, corpus: Corpus, path: dict[str, str | list[str]]) -> Source:
    unknown = sorted(set(path) - set(settings.split_names.values()))
    if unknown:
        allowed = ", ".join(settings.split_names.values())
        raise UserError(f"data.path: {', '.join(unknown)} is no split. Allowed: {allowed}. Fix: correct the name.")
    named = {role: path.get(name) for role, name in settings.split_names.items()}
    listed = {role: [paths] if isinstance(paths, str) else paths for role, paths in named.items() if paths}
    shards = {role: _corpus_files(settings, corpus, paths) for role, paths in listed.items()}
    where = "; ".join(f"{role}: {', '.join(paths)}" for role, paths in listed.items())
    if settings.split in ("hash", "all") or (settings.split == "auto" and list(listed) == ["train"]):
        files = each_file_once([file for role in shards for file in shards[role]], PassedOver())
        _tell_unused(settings, where, list(listed) if len(listed) > 1 else [])
        _name_apart(files)
        return Source(where, {"all": files})
    for role, files in shards.items():
        _tell_other_splits(settings, role, files)
        _name_apart(files)
    return Source(where, dict(shards))


def _tell_other_splits(settings: DataSettings, role: str, files: Sequence[FileShard]) -> None:
    """Say which files given for one split are named after another one."""
    parts = by_name([file.name for file in files], settings.split_names, ask=True).parts
    own = set(parts.get(role, ()))
    others = sorted({i for places in parts.values() for i in places} - own)
    if others:
        names = some([files[i].name for i in others])
        say(f"Data: {names}: named like other splits and read as {settings.split_names[role]}", flush=True)


def _resolve_hub(settings: DataSettings, corpus: Corpus) -> Source:
    hub = settings.hub
    there = hub.splits(settings.retries, corpus.lines_are_rows)
    for role, name in settings.split_names.items():
        if name != role and name not in there:  # asked for by name
            raise UserError(
                f"data.{role}_split={name!r}: {hub.id} has no such split. Allowed: {', '.join(there)}. Fix: --data."
                f"{role}_split with one of these."
            )
    words = split_words(settings.split_names, [name.lower() for name in there])
    named = {role: [name for name in there if name == settings.split_names[role]]
             or [name for name in there if name.lower() in words[role]] for role in settings.split_names}  # fmt: skip
    roles = {role: names[0] for role, names in named.items() if names}
    if settings.split in ("hash", "all"):
        chosen = [("all", name) for name in there]
        _tell_unused(settings, hub.id, list(roles.values()) if len(roles) > 1 else [])
    elif settings.split == "folders" or {"validation", "test"} & set(roles):
        chosen = list(roles.items())
    else:  # a training split alone, as of most corpora that nobody evaluates on
        chosen = [("all", roles.get("train") or next(iter(there)))]
    if left := sorted(set(there) - {name for _, name in chosen}):
        say(f"Data: splits of {hub.id} that are not read: {some(left)}", flush=True)
    # Documents of a folder are called the same wherever it lies.
    called = Path(hub.id).name if Path(hub.id).is_dir() else hub.id
    shards: dict[str, list[Shard]] = {}
    for role, name in chosen:
        found = hub_shards(hub, f"{called}/{name}", there[name], corpus.columns, settings.retries)
        shards.setdefault(role, []).extend(found)
    return Source(f"the hub data set {hub.id}", dict(shards), on_hub=True)
