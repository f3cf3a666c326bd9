"""Folders that are written whole or not at all, and where what is kept between runs lies."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lightning_memlong.errors import UserError


def cache_dir() -> Path:
    """Folder for converted models and token caches: ``$MEMLONG_CACHE``, else ``~/.cache/lightning_memlong``."""
    return Path(os.environ.get("MEMLONG_CACHE", Path.home() / ".cache" / "lightning_memlong"))


def package_file(package: str, name: str) -> Path | None:
    """Path of a data file of an installed package, without importing the package; None if it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / name
    return path if path.exists() else None


def make_folder(folder: Path, key: str = "MEMLONG_CACHE") -> None:
    """Make a folder; ``key`` is the setting that says where, for messages.

    Raises:
        UserError: If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error, key) from error


def write_folder(target: Path, write: Callable[[Path], object], key: str = "MEMLONG_CACHE") -> Path:
    """Fill a folder beside ``target`` and rename it, so that no reader ever sees half of it.

    Args:
        target: The folder.
        write: Fills the folder it is given.
        key: The setting that says where, for messages.

    Raises:
        UserError: If there is no permission or no space to write.
    """
    make_folder(target.parent, key)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            write(scratch)
            scratch.chmod(0o755)  # a scratch folder is its owner's alone; what becomes of it is to be read
            if not target.exists():
                scratch.rename(target)
        except OSError:
            if not target.exists():  # else another process finished first, with the same content
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(target, error, key) from error
    return target


def _cannot_write(target: Path, error: Exception, key: str) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"{key}: cannot write {target} ({reason}). Allowed: a writable folder with free space. Fix: free some "
        f"space or set {key} to another folder."
    )
