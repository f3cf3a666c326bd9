"""Which files are behind a path: a file, a folder, a glob, or an address."""

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from datamodules.network import file_system, not_there, retry
from datamodules.records import Columns
from datamodules.sources import COMPRESSION, FileShard
from lightning_memlong.errors import UserError


def find_files(path: str, extensions: Iterable[str], columns: Columns, retries: int) -> list[FileShard]:
    """The files behind a path, sorted by name: a file, a folder (read recursively), a glob or an address.

    A file has the same name (its path relative to the folder) on a disk and on a server.

    Raises:
        UserError: If there is nothing, or nothing with one of the extensions.
    """
    endings = tuple(extensions)
    found = _find_remote(path, endings, retries) if "://" in path else _find_local(path, endings)
    named = len(found) == 1 and found[0][1] == path  # a file that is named is read whatever its ending
    chosen = [(name, f) for name, f in found if named or has_magic(path) or name.lower().endswith(endings)]
    if not chosen:
        raise UserError(
            f"data.path={path!r} holds no text. Allowed: files ending in {', '.join(endings)}. Fix: correct the path, "
            "or name other endings with --data.extensions."
        )
    return [FileShard(name, f, columns, retries) for name, f in sorted(chosen)]


def has_magic(path: str) -> bool:
    """Whether a path is a glob; what follows the question mark of an address is not."""
    return bool(re.search(r"[*\[]", path.partition("?")[0]) if "://" in path else glob.has_magic(path))


def _find_local(path: str, endings: tuple[str, ...]) -> list[tuple[str, str]]:
    root = Path(path)
    if root.is_file():
        return [(root.name, path)]
    if root.is_dir():
        return [(f.relative_to(root).as_posix(), str(f)) for f in root.rglob("*") if f.is_file()]
    found = [Path(f) for f in glob.glob(path, recursive=True)] if has_magic(path) else []
    inside = [f for folder in found if folder.is_dir() for f in folder.rglob("*")
              if f.name.lower().endswith(endings)]  # fmt: skip
    files = {f for f in [*found, *inside] if f.is_file()}
    if not files:
        raise UserError(
            f"data.path={path!r} does not exist. Allowed: a file, a folder, a glob that matches files, or an http:// "
            "address. Fix: correct it."
        )
    fixed = Path(re.split(r"[*?\[]", path)[0].rpartition("/")[0] or ("/" if path.startswith("/") else "."))
    return [(f.relative_to(fixed).as_posix(), str(f)) for f in files]


def _find_remote(path: str, endings: tuple[str, ...], retries: int) -> list[tuple[str, str]]:
    plain = re.sub(r"[?#].*", "", path)
    known = (*endings, ".parquet", ".jsonl", ".json", ".txt", *COMPRESSION)
    if not has_magic(path) and plain.lower().endswith(known):
        return [(unquote(plain.rpartition("/")[2]), path)]
    fs, root = file_system(path)
    try:
        names = retry(lambda: fs.glob(root) if has_magic(path) else fs.find(root), path, retries)
    except UserError:
        raise
    except Exception as error:
        raise not_there(path, error) from error
    if not names:
        raise not_there(path, FileNotFoundError())
    urls = [name if "://" in name else fs.unstrip_protocol(name) for name in names]
    start = re.split(r"[*\[]", plain)[0].rpartition("/")[0] if has_magic(path) else plain.rstrip("/")
    return [(unquote(url.removeprefix(start).lstrip("/")), url) for url in urls]
