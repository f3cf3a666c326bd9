"""Where a corpus is: its shards, by split if the source has splits of its own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.corpus import Corpus
from datamodules.files import find_files
from datamodules.hub import hub_shards
from datamodules.records import Shard
from datamodules.settings import DataSettings
from datamodules.sources import FileShard
from datamodules.splits import by_name
from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError


@dataclass
class Source:
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
    paths = [path] if isinstance(path, str) else path
    files = [file for p in paths for file in _corpus_files(settings, corpus, p)]
    where = ", ".join(paths)
    divided = by_name([file.name for file in files], settings.split_names)
    _name_apart(files)
    if settings.split in ("hash", "all") or (settings.split == "auto" and not divided):
        return Source(where, {"all": files})
    if not divided:
        raise UserError(
            f"data.split='folders': {where} has neither folders train/ and validation/ nor files all named after a "
            "split. Allowed: such names. Fix: rename them, or give --data.path as {train: ..., validation: ...}, or "
            "use --data.split hash."
        )
    outside = len(files) - len({place for places in divided.values() for place in places})
    if outside:
        say(f"Data: {outside} files of {where} are in no split's folder and are not read", flush=True)
    return Source(where, {role: [files[i] for i in places] for role, places in divided.items()})


def _name_apart(files: Sequence[FileShard]) -> None:
    """Give files of the same name, from several paths, names of their own: documents are known by them."""
    count = Counter(file.name for file in files)
    for file in files:
        if count[file.name] > 1:
            file.name = file.url


def _corpus_files(settings: DataSettings, corpus: Corpus, path: str) -> list[FileShard]:
    return [f for f in find_files(path, settings.extensions, corpus.columns, settings.retries) if corpus.wanted(f.name)]


def _resolve_by_split(settings: DataSettings, corpus: Corpus, path: dict[str, str | list[str]]) -> Source:
    unknown = sorted(set(path) - set(settings.split_names.values()))
    if unknown:
        allowed = ", ".join(settings.split_names.values())
        raise UserError(f"data.path: {', '.join(unknown)} is no split. Allowed: {allowed}. Fix: correct the name.")
    named = {role: path.get(name) for role, name in settings.split_names.items()}
    listed = {role: [paths] if isinstance(paths, str) else paths for role, paths in named.items() if paths}
    shards = {role: [f for p in paths for f in _corpus_files(settings, corpus, p)] for role, paths in listed.items()}
    where = "; ".join(f"{role}: {', '.join(paths)}" for role, paths in listed.items())
    if settings.split in ("hash", "all"):
        files = [file for role in shards for file in shards[role]]
        _name_apart(files)
        return Source(where, {"all": files})
    for files in shards.values():
        _name_apart(files)
    return Source(where, dict(shards))


def _resolve_hub(settings: DataSettings, corpus: Corpus) -> Source:
    hub = settings.hub
    there = hub.splits(settings.retries, corpus.lines_are_rows)
    roles = {role: name for role, name in settings.split_names.items() if name in there}
    for role, name in settings.split_names.items():
        if name != role and name not in there:  # asked for by name
            raise UserError(
                f"data.{role}_split={name!r}: {hub.id} has no such split. Allowed: {', '.join(there)}. Fix: --data."
                f"{role}_split with one of these."
            )
    if settings.split in ("hash", "all"):
        chosen = [("all", name) for name in there]
    elif settings.split == "folders" or {"validation", "test"} & set(roles):
        chosen = list(roles.items())
    else:  # a training split alone, as of most corpora that nobody evaluates on
        chosen = [("all", roles.get("train") or next(iter(there)))]
    shards: dict[str, list[Shard]] = {}
    for role, name in chosen:
        found = hub_shards(hub, f"{hub.id}/{name}", there[name], corpus.columns, settings.retries)
        shards.setdefault(role, []).extend(found)
    return Source(f"the hub data set {hub.id}", dict(shards), on_hub=True)
