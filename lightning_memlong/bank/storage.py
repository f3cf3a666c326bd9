"""Where keys and values of chunks lie: one preallocated pair of tensors, written once a chunk, never moved.

Legend: L layers, H key/value heads, R rows, S slots a row, C tokens of a chunk, D head size.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_memlong.errors import UserError

Where = Literal["device", "host", "disk"]


class ChunkStorage:
    """Slots for keys and values, (L, H, R * S, C, D) each; in memory, a chunk of all layers and heads is one piece.

    So what is read of a file is a few long stretches, not one for each layer and head.

    Args:
        keys_like: (L, H, 1, C, D) or anything with these sizes: gives layers, heads, chunk and head size.
        slots: R * S.
        dtype: Element type; int8 keeps a scale for each head of each token.
        device: Where the model is, and what is read is handed over.
        where: ``device``; ``host``: in the machine's memory (pinned if the model is on a GPU), so that the device
            holds what was retrieved only; ``disk``: in a temporary file, which is gone when the process is.
        folder: Folder of that file; None: the system's for temporary files.
        given: Element type of what is written, and of what int8 is read as; None: ``dtype``.

    Raises:
        UserError: If there is not enough memory, or space on the disk.
    """

    def __init__(
        self,
        keys_like: torch.Size,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        where: Where = "device",
        folder: str | None = None,
        given: torch.dtype | None = None,
    ) -> None:
        layers, heads, _, chunk_size, size = keys_like
        # "cuda" and "cuda:0" are one place, and compare as two.
        self.device, self.where, self.dtype = torch.empty(0, device=device).device, where, dtype
        self.given = given or dtype
        shape = (slots, layers, heads, chunk_size, size)
        # Not zeroed: the pages of a long bank that are never filled are never touched.
        self.keys, self.values = (self._room(shape, dtype, folder) for _ in range(2))
        self._scales: list[Tensor] = []
        if dtype == torch.int8:
            self._scales = [self._room((*shape[:-1], 1), torch.float32, folder) for _ in range(2)]

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype, folder: str | None) -> Tensor:
        return self._empty(shape, dtype, folder).permute(1, 2, 0, 3, 4)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, folder: str | None) -> Tensor:
        count = torch.Size(shape).numel()
        needed = count * dtype.itemsize
        try:
            if self.where == "disk":
                return _file(folder, needed).view(dtype)[:count].view(shape)
            on_host = self.where == "host" or self.device.type == "cpu"
            if on_host and needed > (free := _free_memory()):
                raise RuntimeError(f"{free / 1e9:.1f} GB of memory are free")
            pinned = on_host and self.device.type == "cuda"
            return torch.empty(shape, dtype=dtype, device="cpu" if on_host else self.device, pin_memory=pinned)
        except (RuntimeError, OSError) as error:  # torch.OutOfMemoryError is a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"memory.storage={self.where!r}: {needed / 1e9:.1f} GB for one of keys and values cannot be had "
                f"({reason}). Allowed: what fits. Fix: lower --memory.capacity or --data.batch_size, use "
                "--memory.dtype int8, or --memory.storage host or disk (--memory.storage_folder)."
            ) from error

    def fits(self, chunks: torch.Size) -> bool:
        """Whether chunks (L, H, n, C, D) have the stored ones' layers, heads, chunk and head size."""
        return chunks[:2] + chunks[3:] == self.keys.shape[:2] + self.keys.shape[3:]

    def write(self, keys: Tensor, values: Tensor, sources: Tensor, slots: Tensor) -> None:
        """Copy chunks ``sources`` (m,) of keys and values (L, H, n, C, D) into ``slots`` (m,)."""
        runs = list(_runs(sources.tolist(), slots.tolist()))
        for i, (held, new) in enumerate(((self.keys, keys), (self.values, values))):
            chosen, scale = quantise(new.detach()) if self._scales else (new.detach(), None)
            for source, slot, count in runs:  # a slice is copied faster than an index, and most slots are neighbours
                held[:, :, slot : slot + count].copy_(chosen[:, :, source : source + count])
                if scale is not None:
                    self._scales[i][:, :, slot : slot + count].copy_(scale[:, :, source : source + count])

    def read(self, slots: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (L, R, H, k * C, D) of slots (R, k), on the device; zeros where ``real`` (R, k) is false."""
        rows, k = slots.shape
        layers, heads, _, chunk_size, size = self.keys.shape
        missing = (~real).flatten().nonzero().flatten()
        picked = []
        for i, held in enumerate((self.keys, self.values)):
            chunks = self._pick(held, slots.flatten())
            if self._scales:
                chunks = (chunks.float() * self._pick(self._scales[i], slots.flatten())).to(self.given)
            if len(missing):  # masked tokens must still be finite: 0 x NaN is NaN
                chunks.index_fill_(2, missing.to(chunks.device), 0)
            picked.append(chunks.view(layers, heads, rows, k * chunk_size, size).transpose(1, 2))
        return picked[0], picked[1]

    def _pick(self, held: Tensor, slots: Tensor) -> Tensor:
        if held.device.type == self.device.type or self.device.type == "cpu":  # "cuda" is not equal to "cuda:0"
            return held.index_select(2, slots.to(held.device))
        # Through pinned memory: the copy is queued, and nobody waits for it here.
        staged = torch.empty(
            (*held.shape[:2], len(slots), *held.shape[3:]), dtype=held.dtype, pin_memory=self.device.type == "cuda"
        )
        torch.index_select(held, 2, slots, out=staged)
        return staged.to(self.device, non_blocking=True)

    def copy_from(self, other: "ChunkStorage", start: int, at: int, count: int) -> None:
        """Copy ``count`` slots of another storage of the same sizes, from ``start`` on, to ``at``."""
        for name, mine in self._parts().items():
            mine[:, :, at : at + count].copy_(other._parts()[name][:, :, start : start + count])

    def _parts(self) -> dict[str, Tensor]:
        scales = dict(zip(("key_scales", "value_scales"), self._scales, strict=False))
        return {"keys": self.keys, "values": self.values, **scales}

    def take(self, slots: Tensor) -> dict[str, Tensor]:
        """What the slots (n,) hold, as it is stored, on the CPU: keys, values, and their scales if there are any."""
        return {name: t.index_select(2, slots.to(t.device)).cpu() for name, t in self._parts().items()}

    def put(self, slots: Tensor, saved: dict[str, Tensor]) -> None:
        """Write back what :meth:`take` gave."""
        for name, t in self._parts().items():
            t.index_copy_(2, slots.to(t.device), saved[name].to(t.device))


def quantise(chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks (L, H, n, C, D) as int8, and the scale (L, H, n, C, 1) float32 of each head of each token."""
    scale = chunks.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 127
    return (chunks.float() / scale).round().to(torch.int8), scale


def as_chunks(window: Tensor, chunk_size: int) -> Tensor:
    """Keys or values of windows (L, R, H, T, D) as chunks (L, H, R * n, C, D), row by row."""
    layers, rows, heads, tokens, size = window.shape
    return window.transpose(1, 2).reshape(layers, heads, rows * tokens // chunk_size, chunk_size, size)


def _runs(sources: list[int], slots: list[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches in which sources and slots both go up by one: first source, first slot, length."""
    start = 0
    for i in range(1, len(sources) + 1):
        if i == len(sources) or sources[i] != sources[i - 1] + 1 or slots[i] != slots[i - 1] + 1:
            yield sources[start], slots[start], i - start
            start = i


def _file(folder: str | None, needed: int) -> Tensor:
    """Bytes in a file without a name: its space is reserved now, and free again when nobody maps it any more."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="memlong-bank-", dir=folder)
    try:
        # Writing into a hole on a full disk would kill the process without a word.
        os.posix_fallocate(handle, 0, max(needed, 1))
        return torch.from_file(name, shared=True, size=max(needed, 1), dtype=torch.uint8)
    finally:
        os.close(handle)
        os.unlink(name)


def _free_memory() -> int:
    """Memory that can be had without swapping [bytes]."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize
