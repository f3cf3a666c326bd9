"""Which files are behind a path: a file, a folder, a glob, or an address."""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from lightning_memlong.errors import UserError

from .formats import COMPRESSION, ROWS
from .network import file_system, not_there, retry
from .records import Columns
from .sources import FileShard
from .walk import PassedOver, walk


def find_files(
    path: str,
    extensions: Iterable[str],
    columns: Columns,
    retries: int,
    passed: PassedOver | None = None,
    timeout_s: float = 60,
) -> list[FileShard]:
    """The files behind a path, sorted by name: a file, a folder (read recursively), a glob or an address.

    A file has the same name (its path relative to the folder) on a disk and on a server.

    Args:
        path: Where to look; what is there is not taken for a glob, whatever its name.
        extensions: Endings of files that are read from a folder.
        columns: Which columns their rows have.
        retries: How often a network fault is followed by another try.
        passed: Is told what is not read.
        timeout_s: How long a server may take to answer [s].

    Raises:
        UserError: If there is nothing, or nothing with one of the extensions.
    """
    endings, passed = tuple(extensions), PassedOver() if passed is None else passed
    path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", lambda scheme: scheme[0].lower(), path)
    remote = "://" in path
    found = _find_remote(path, endings, retries, timeout_s) if remote else _find_local(path, endings, passed)
    hidden = {name for name, f in found if remote and f != path and _is_hidden(name)}
    passed.hidden += sorted(hidden)
    found = [(name, f) for name, f in found if name not in hidden]
    named = (len(found) == 1 and found[0][1] == path) or is_glob(path)  # what is named is read whatever its ending
    chosen = []
    for name, f in found:
        if named or name.lower().endswith(endings):
            chosen.append(FileShard(name, f, columns, retries, timeout_s))
        else:
            passed.endings[PurePosixPath(name).suffix.lower()] += 1
    if not chosen:
        words, packed = passed.words(), tuple(COMPRESSION)
        plain = ", ".join(end for end in endings if not end.endswith(packed)) or ", ".join(endings)
        plain += f" (or {', '.join(packed)} of these)" if any(end.endswith(packed) for end in endings) else ""
        raise UserError(
            f"data.path={path!r} holds no text{f' (not read: {words})' if words else ''}. Allowed: files ending in "
            f"{plain}. Fix: correct the path, or name other endings with --data.extensions."
        )
    return sorted(chosen, key=lambda file: (file.name, file.url))


def is_glob(path: str) -> bool:
    """Whether a path stands for what matches it: a file or folder that is there stands for itself."""
    return has_magic(path) and ("://" in path or not os.path.lexists(path))


def has_magic(path: str) -> bool:
    """Whether a path is a glob; what follows the question mark of an address is not."""
    return bool(re.search(r"[*\[]", path.partition("?")[0]) if "://" in path else glob.has_magic(path))


def _find_local(path: str, endings: tuple[str, ...], passed: PassedOver) -> list[tuple[str, str]]:
    root = Path(path)
    if root.is_file():
        return [(root.name, path)]
    if root.is_dir():
        return [(f.relative_to(root).as_posix(), str(f)) for f in walk(root, passed)]
    found = [Path(f) for f in glob.glob(path, recursive=True)] if has_magic(path) else []
    inside = [
        f for folder in found if folder.is_dir() for f in walk(folder, passed) if f.name.lower().endswith(endings)
    ]
    files = {f for f in [*found, *inside] if f.is_file()}
    passed.broken += [str(f) for f in found if not f.exists()]
    if not files:
        what = "is a link to nothing" if root.is_symlink() else "does not exist"
        what = "is a pipe, and text is read more than once: write it to a file" if root.exists() else what
        raise UserError(
            f"data.path={path!r} {what}. Allowed: a file, a folder, a glob that matches files, or an http:// "
            "address. Fix: correct it."
        )
    fixed = Path(re.split(r"[*?\[]", path)[0].rpartition("/")[0] or ("/" if path.startswith("/") else "."))
    return [(f.relative_to(fixed).as_posix(), str(f)) for f in files]


def _find_remote(path: str, endings: tuple[str, ...], retries: int, timeout_s: float) -> list[tuple[str, str]]:
    plain = re.sub(r"[?#].*", "", path)
    known = (*endings, *ROWS, ".txt", *COMPRESSION)
    if not has_magic(path) and plain.lower().endswith(known):
        return [(unquote(plain.rpartition("/")[2]), path)]
    fs, root = file_system(path, timeout_s)
    try:
        names = retry(lambda: fs.glob(root) if has_magic(path) else fs.find(root), path, retries)
        if not names:
            retry(lambda: fs.info(root), path, retries)  # a listing that is empty does not say why
    except UserError:
        raise
    except Exception as error:
        raise not_there(path, error) from error
    if not names:
        raise not_there(path, FileNotFoundError())
    urls = [name if "://" in name else fs.unstrip_protocol(name) for name in names]
    start = re.split(r"[*\[]", plain)[0].rpartition("/")[0] if has_magic(path) else plain.rstrip("/")
    if urls == [plain]:
        return [(unquote(plain.rpartition("/")[2]), path)]  # a file, whatever its ending
    return [(unquote(url.removeprefix(start).lstrip("/")), url) for url in urls]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
