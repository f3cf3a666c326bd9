"""Which files and which documents belong to train, validation and test."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal

from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError

ROLES = ("train", "validation", "test")
NEEDED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
Split = Literal["auto", "hash", "folders", "all"]
ALIASES = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test"}}


def needed(stage: str) -> tuple[str, ...]:
    """The splits a stage of training or evaluation reads."""
    return NEEDED.get(stage, ROLES)


def by_name(names: Sequence[str], splits: Mapping[str, str]) -> dict[str, list[int]]:
    """Places of files whose top folder, or else whose own name, is that of a split.

    Folders decide if there is one for train and one for another split; otherwise every single file must be named after
    one split (train-00000-of-00023.parquet, wiki.valid.raw), or none counts as such.

    Args:
        names: Paths of files, relative to the source.
        splits: Of each role, what its split is called.
    """
    words = {role: ALIASES[role] | {name} if name == role else {name} for role, name in splits.items()}
    tops = [PurePosixPath(name).parts[0] for name in names]
    parts = {role: [i for i, top in enumerate(tops) if top in words[role]] for role in ROLES}
    if parts["train"] and (parts["validation"] or parts["test"]):
        return parts
    said = [{splits[role] for role in ROLES if _speaks_of(words[role], PurePosixPath(name).name)} for name in names]
    if any(len(which) != 1 for which in said):
        return {}
    return {role: [i for i, which in enumerate(said) if splits[role] in which] for role in ROLES}


def _speaks_of(words: set[str], name: str) -> bool:
    """Whether one of the words stands in a name by itself."""
    return any(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", name, re.I) for word in words)


def hash_role(document: str, fraction: float) -> str:
    """The split a document belongs to by a hash of its name: the same one whatever else is there."""
    mark = _mark(document)
    return "validation" if mark < fraction else "test" if mark < 2 * fraction else "train"


def by_hash(documents: Sequence[str], fraction: float) -> dict[str, list[int]]:
    """Places of documents by split, none left empty where that can be helped."""
    parts: dict[str, list[int]] = {role: [] for role in ROLES}
    for i, document in enumerate(documents):
        parts[hash_role(document, fraction)].append(i)
    _fill(parts, sorted(range(len(documents)), key=lambda i: _mark(documents[i])), documents)
    return parts


def _mark(document: str) -> float:
    return int(hashlib.sha256(document.encode()).hexdigest()[:12], 16) / 16**12


def _fill(parts: dict[str, list[int]], ranked: list[int], documents: Sequence[str]) -> None:
    """Give empty splits a document: a handful rarely fills all three. What is shared is never shared with train."""
    for part, other in (("validation", "test"), ("test", "validation")):
        if parts[part]:
            continue
        free = [i for i in ranked if i in parts["train"]]
        if len(free) > 1 or (free and not parts[other]):
            parts[part] = free[:1]
            parts["train"].remove(free[0])
        else:
            parts[part] = list(parts[other])
        names = ", ".join(documents[i] for i in parts[part])
        say(f"Data: too few documents for a {part} split by hash; it gets {names}", flush=True)
    if not parts["train"] and parts["test"] != parts["validation"]:
        parts["train"], parts["test"] = parts["test"], list(parts["validation"])


def require_parts(parts: Mapping[str, Sequence[int]], stage: str, how: str, count: int) -> None:
    """Raise a :class:`UserError` if a split that the stage needs is empty, or shared with train."""
    empty = [role for role in needed(stage) if not parts[role]]
    shared = stage == "fit" and set(parts["train"]) & (set(parts["validation"]) | set(parts["test"]))
    if empty or shared:
        raise UserError(
            f"data.split={how!r}: {count} documents leave no {' and no '.join(empty or ['separate test'])} split. "
            f"Allowed: for {stage}, at least one document for each of {', '.join(needed(stage))}. Fix: add documents, "
            "sort them into folders train/ and validation/, or lower data.min_document_tokens."
        )
