"""Banks as safetensors files: read a book once, ask many times."""

import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_memlong.errors import UserError

FORMAT, VERSION = "memlong-bank", 2


def _sum_of(tensor: torch.Tensor) -> int:
    """A checksum of a tensor's kind, shape and numbers."""
    kind = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, kind) if tensor.numel() else kind


def save_bank(path: Path, state: dict[str, Any], provenance: Mapping[str, str]) -> Path:
    """Write a bank's state beside its place and rename it, so that nobody ever finds half of it.

    Raises:
        UserError: If there is no permission or no space to write.
    """
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for number, row in enumerate(state["ledgers"]):
        tensors |= {f"{number}.{name}": t.contiguous().cpu() for name, t in row.items() if isinstance(t, torch.Tensor)}
        rows.append({name: value for name, value in row.items() if not isinstance(value, torch.Tensor)})
    facts = {"bank": {**state, "ledgers": rows}, "made_with": dict(provenance)}
    told = json.dumps(facts)
    sums = {"": zlib.crc32(told.encode())} | {name: _sum_of(tensor) for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "facts": told, "sums": json.dumps(sums)}
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        save_file(tensors, scratch, metadata)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        raise UserError(
            f"the bank cannot be written to {path} ({getattr(error, 'strerror', None) or error}). Allowed: a writable "
            "folder with free space. Fix: free some, or choose another path."
        ) from error
    return path


def load_bank(path: Path, provenance: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read what :func:`save_bank` wrote.

    Returns:
        The state, and what it was made with.

    Raises:
        UserError: If the file is damaged, of another version, or was made with something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a bank. Allowed: a file written by MemoryBank.save. Fix: give another.")
            if metadata["version"] != str(VERSION):
                raise UserError(
                    f"{path} is a bank of version {metadata['version']}. Allowed: {VERSION}. Fix: save it again, or "
                    "use the release of this project that wrote it."
                )
            sums = json.loads(metadata["sums"])
            _require_whole(sums.pop("") == zlib.crc32(metadata["facts"].encode()) and {*sums} == {*file.keys()})
            facts = json.loads(metadata["facts"])
            require_same(f"the bank {path}", facts["made_with"], provenance)
            state = facts["bank"]
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                number, field = name.split(".", 1)
                tensor = state["ledgers"][int(number)][field] = file.get_tensor(name)
                _require_whole(sums[name] == _sum_of(tensor))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"the bank {path} does not exist. Allowed: an existing file. Fix: correct the path.") from error
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"the bank {path} is damaged or cut short ({error}). Allowed: a whole file. Fix: save it again."
        ) from error
    return state, dict(facts["made_with"])


def _require_whole(ok: bool) -> None:
    if not ok:
        raise ValueError("its checksum is another")


def require_same(what: str, there: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Check what a bank was made with.

    Args:
        what: The bank, for the message.
        there: What it was made with.
        wanted: What it must have been made with; other keys of ``there`` do not matter.

    Raises:
        UserError: If something differs.
    """
    differ = [f"{key} is {there.get(key)!r} there and {value!r} here" for key, value in wanted.items()
              if there.get(key) != value]  # fmt: skip
    if differ:
        raise UserError(
            f"{what} was made with something else ({'; '.join(differ)}). Allowed: what it was made with. Fix: use "
            "that, or read the text again."
        )
