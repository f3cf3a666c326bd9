"""Which files are behind a path: a file, a folder, a glob, or an address."""

import glob
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import fsspec

from datamodules.network import not_there, once_more
from datamodules.rows import Columns
from datamodules.sources import COMPRESSION, FileShard
from lightning_memlong.errors import UserError


def find_files(path: str, extensions: Iterable[str], columns: Columns, retries: int) -> list[FileShard]:
    """The files behind a path, sorted by name: a file, a folder (read recursively), a glob or an address.

    Raises:
        UserError: If there is nothing, or nothing with one of the extensions.
    """
    endings = tuple(extensions)
    if "://" in path:
        root, found = _find_remote(path, endings, retries)
    else:
        root, found = _find_local(path)
    magic = bool(re.search(r"[*\[]" if "://" in path else r"[*?\[]", path))
    files = sorted((str(PurePosixPath(f).relative_to(root)) if f != root else PurePosixPath(f).name, f) for f in found)
    if len(files) != 1 or files[0][1] != root:
        files = [(name, f) for name, f in files if magic or name.lower().endswith(endings)]
    if not files:
        raise UserError(
            f"data.path={path!r} holds no text. Allowed: files ending in {', '.join(endings)}. Fix: correct the path, "
            "or name other endings with --data.extensions."
        )
    return [FileShard(name, f if "://" in path else str(f), columns, retries) for name, f in files]


def _find_local(path: str) -> tuple[str, list[str]]:
    root = Path(path)
    if root.is_file():
        return str(root), [str(root)]
    if root.is_dir():
        return str(root), [str(f) for f in root.rglob("*") if f.is_file()]
    found = [f for f in glob.glob(path, recursive=True) if Path(f).is_file()]
    if not found:
        raise UserError(
            f"data.path={path!r} does not exist. Allowed: a file, a folder, a glob that matches files, or an http:// "
            "address. Fix: correct it."
        )
    return _fixed_part(path), [str(Path(f)) for f in found]


def _find_remote(path: str, endings: tuple[str, ...], retries: int) -> tuple[str, list[str]]:
    known = (*endings, ".parquet", ".jsonl", ".json", ".txt", *COMPRESSION)
    magic = re.search(r"[*\[]", path)
    if not magic and re.sub(r"[?#].*", "", path).lower().endswith(known):
        return path, [path]
    fs, root = fsspec.url_to_fs(path)
    try:
        names = once_more(lambda: fs.glob(root) if magic else fs.find(root), path, retries)
    except OSError as error:
        raise not_there(path, error) from error
    if not names:
        raise not_there(path, FileNotFoundError())
    found = [name if "://" in name else fs.unstrip_protocol(name) for name in names]
    return (_fixed_part(path) if magic else path.rstrip("/")), found


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard."""
    return re.split(r"[*?\[]", pattern)[0].rpartition("/")[0] or "."
