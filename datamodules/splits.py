"""Which files and which documents belong to train, validation and test."""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError

from .formats import printable

ROLES = ("train", "validation", "test")
NEEDED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
Split = Literal["auto", "hash", "folders", "all"]
ALIASES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}
EITHER = {"eval", "evaluation"}
"""Names of a validation split, or of a test split where validation has another name (``dev`` and ``eval``)."""
SOURCES = (".py", ".md")
"""Endings of files whose names rather say what they do or explain: only where most are so named, they are splits."""


def needed(stage: str) -> tuple[str, ...]:
    """The splits a stage of training or evaluation reads."""
    return NEEDED.get(stage, ROLES)


def some(names: Sequence[str], most: int = 5) -> str:
    """How many there are, and what the first of them are called."""
    rest = f", and {len(names) - most:,} more" if len(names) > most else ""
    return f"{len(names):,} ({printable(', '.join(names[:most]))}{rest})"


class Named(NamedTuple):
    """Which files a source's own names put into which split."""

    parts: dict[str, list[int]]
    """Of each split, places of its files; empty if the names are not used as splits."""
    unused: list[str]
    """Folders and files that are named like a split and are not used as such."""


def by_name(names: Sequence[str], splits: Mapping[str, str], ask: bool = False) -> Named:
    """Read splits off the names of folders and files.

    At the highest level of folders where two splits are named, folders and files count together, in any case and by
    their usual aliases. Names that are a split's and nothing else (``train/``, ``val.jsonl.zst``,
    ``test-00000-of-00002.parquet``) need nothing more where two stand side by side, and other files are then outside.
    Otherwise, and for names that merely hold a split's (``wiki.valid.raw``), most files must have such: one book about
    a train must not hide the others.

    Args:
        names: Paths of files, relative to the source.
        splits: Of each role, what its split is called.
        ask: Whether splits were asked for, so that names are taken however few files have them.
    """
    seen: dict[str, None] = {}
    paths = [PurePosixPath(name).parts for name in names]
    for depth in range(max(map(len, paths), default=0)):
        words = split_words(splits, [words for p in paths if len(p) > depth for words in _words_of(p, depth)])
        dividing: list[dict[str, list[int]]] = []
        for strict in (True, False):
            said = [_roles_of(path, depth, words, strict) for path in paths]
            parts = {role: [i for i, roles in enumerate(said) if role in roles] for role in ROLES}
            if _divides(parts, paths, depth, strict, ask):
                dividing.append(parts)
            if strict or _splits_in(parts) > 1:
                seen |= {"/".join(path[: depth + 1]): None for path, roles in zip(paths, said, strict=True) if roles}
        if dividing:  # by names that are a split's and nothing else, unless those that hold more name more splits
            return Named(max(dividing, key=_splits_in), [])
    return Named({}, list(seen))


def split_words(splits: Mapping[str, str], there: Collection[str]) -> dict[str, set[str]]:
    """Of each role, the words that mean it; a name that was chosen for a role means no other by being an alias.

    Args:
        splits: Of each role, what its split is called.
        there: Names that are there.
    """
    chosen = {name.lower() for role, name in splits.items() if name != role}
    words = {
        role: (ALIASES[role] - chosen) | {role} if name == role else {name.lower()} for role, name in splits.items()
    }
    either = "test" if words["validation"] & set(there) else "validation"
    if splits[either] == either:
        words[either] |= EITHER - chosen
    return words


def _words_of(path: Sequence[str], depth: int) -> list[str]:
    """The name at a depth of a path, without endings and shard numbers: train, val_01, test-00000-of-00002."""
    name = path[depth].lower()
    if depth == len(path) - 1:
        if name.endswith(SOURCES):
            return []
        name = name.partition(".")[0]
    return [name, re.sub(r"[-_ ]?\d+([-_]of[-_]\d+)?$", "", name)]


def _roles_of(path: Sequence[str], depth: int, words: Mapping[str, set[str]], strict: bool) -> list[str]:
    """The roles that the name at a depth of a path speaks of; none if it speaks of two splits."""
    if len(path) <= depth:
        return []
    if strict:
        here = set(_words_of(path, depth))
        return [role for role in ROLES if words[role] & here]
    said = {role: {word for word in words[role] if _holds(path[depth], word)} for role in ROLES}
    roles = [role for role in ROLES if said[role]]
    return roles if not roles or set.intersection(*(said[role] for role in roles)) else []


def _holds(name: str, word: str) -> bool:
    """Whether a word stands in a name by itself."""
    return re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z])", name, re.I) is not None


def _splits_in(parts: Mapping[str, list[int]]) -> int:
    """How many splits there are; roles may share one."""
    return len({tuple(places) for places in parts.values() if places})


def _divides(
    parts: Mapping[str, list[int]], paths: Sequence[tuple[str, ...]], depth: int, strict: bool, ask: bool
) -> bool:
    """Whether the names at a depth divide a source: files of training alone are still to be divided."""
    named = {i for places in parts.values() for i in places}
    if _splits_in(parts) < 2:
        files = all(len(path) == depth + 1 for path in paths)
        return bool(named) and (ask or (not parts["train"] and files and len(named) == len(paths)))
    if ask or 2 * len(named) > len(paths):
        return True
    beside: dict[tuple[str, ...], dict[str, list[int]]] = {}
    for role, places in parts.items():
        for i in places:
            beside.setdefault(paths[i][:depth], {}).setdefault(role, []).append(i)
    return strict and any(_splits_in(roles) > 1 for roles in beside.values())


def hash_role(digest: str, fraction: float) -> str:
    """The split of a document by the digest of its text: the same one whatever else is there, and wherever it lies."""
    mark = _mark(digest)
    return "validation" if mark < fraction else "test" if mark < 2 * fraction else "train"


def by_hash(names: Sequence[str], digests: Sequence[str], fraction: float) -> dict[str, list[int]]:
    """Places of documents by split, equal texts in the same; no split is left empty where that can be helped.

    Args:
        names: What documents are called.
        digests: Of each, a digest of its text.
        fraction: Share of validation, and of test.
    """
    equal: dict[str, list[int]] = {}
    for i, digest in enumerate(digests):
        equal.setdefault(digest, []).append(i)
    parts: dict[str, list[str]] = {role: [] for role in ROLES}
    for digest in equal:
        parts[hash_role(digest, fraction)].append(digest)
    filled = _fill(parts)
    for part in (role for role in ROLES if filled[role] != parts[role]):
        found = ", ".join(names[i] for digest in filled[part] for i in equal[digest])
        say(f"Data: too few documents for splits by hash; {part} holds {found or 'none'}", flush=True)
    return {role: sorted(i for digest in of_role for i in equal[digest]) for role, of_role in filled.items()}


def _mark(digest: str) -> float:
    return int(hashlib.sha256(digest.encode()).hexdigest()[:12], 16) / 16**12


def _fill(parts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The splits, with a text of the largest for each empty one: a handful rarely fills all three.

    Of two texts validation and test share one, which is never shared with train; a single one is only evaluated.
    """
    ranked = sorted((digest for of_role in parts.values() for digest in of_role), key=_mark)
    if len(ranked) < 3:
        return {"train": ranked[1:], "validation": ranked[:1], "test": ranked[:1]}
    filled = {role: sorted(of_role, key=_mark) for role, of_role in parts.items()}
    for role in ROLES:
        if not filled[role]:
            largest = max(filled.values(), key=len)
            filled[role].append(largest.pop(-1 if role == "train" else 0))
    return {role: of_role if set(of_role) != set(parts[role]) else parts[role] for role, of_role in filled.items()}


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
