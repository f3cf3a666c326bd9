"""Where keys and values of chunks lie: one preallocated pair of tensors, written once a chunk, never moved.

Legend: L layers, H key/value heads, R rows, S slots a row, C tokens of a chunk, D head size.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_memlong.bank.transfer import Arriving, Line, Transfer
from lightning_memlong.errors import UserError
from lightning_memlong.text import sent

Where = Literal["device", "host", "disk"]


class ChunkStorage:
    """Slots for keys and values, (L, H, R * S, C, D) each; in memory, a chunk of all layers and heads is one piece.

    So what is read of a file is a few long stretches, not one for each layer and head.

    Args:
        keys_like: (L, H, 1, C, D) or anything with these sizes: gives layers, heads, chunk and head size.
        slots: R * S.
        dtype: Element type; int8 keeps a scale for each head of each token.
        device: Where the model is, and what is read is handed over.
        where: ``device``; ``host``: in the machine's memory, so that the device holds what was retrieved only;
            ``disk``: in a temporary file, which is gone when the process is.
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
        self._line, self._transfer = Line(), Transfer(self.device, "bank")
        shape = (slots, layers, heads, chunk_size, size)
        # Not zeroed: the pages of a long bank that are never filled are never touched.
        self.keys, self.values = (self._room(shape, dtype, folder) for _ in range(2))
        self._scales: list[Tensor] = []
        if dtype == torch.int8:
            self._scales = [self._room((*shape[:-1], 1), torch.float32, folder) for _ in range(2)]

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype, folder: str | None) -> Tensor:
        with torch.inference_mode(False):  # it may be written to in another mode
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
            # Not pinned: that would touch every page, and PyTorch rounds such room up to a power of two.
            return torch.empty(shape, dtype=dtype, device="cpu" if on_host else self.device)
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

    def stage(self, keys: Tensor, values: Tensor) -> Arriving:
        """Chunks of keys and values (L, H, n, C, D) on their way to where they are to be written, as they are to lie.

        On a GPU nobody waits for them, and until they are there nobody may change them; elsewhere what is still being
        read is waited for.

        Raises:
            OSError, RuntimeError: What went wrong with something that was written before.
        """
        if self._writes_beside:
            self._line.check()
        else:
            self._line.settle()
        new = self._as_stored(*(t.detach().to(self.device) for t in (keys, values)))
        new = [t.permute(2, 0, 1, 3, 4) for t in new]
        return Arriving(new, self.device, None) if self.where == "device" else self._transfer.to_host(new)

    def write(self, staged: Arriving, sources: Tensor, slots: Tensor) -> None:
        """Copy chunks ``sources`` (m,) of what :meth:`stage` gave into ``slots`` (m,), in order with what is read."""
        runs = list(_runs(sources.tolist(), slots.tolist()))
        if self._writes_beside:
            self._line.leave(self._write, staged, runs)
        else:
            self._write(staged, runs)

    @property
    def _writes_beside(self) -> bool:
        """Whether there are copies to wait for before anything can be written."""
        return self.where != "device" and self.device.type == "cuda"

    def _as_stored(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Keys and values as they are stored, and the scales, if there are any."""
        if not self._scales:
            return [keys.to(self.dtype), values.to(self.dtype)]
        (keys, key_scales), (values, value_scales) = quantise(keys), quantise(values)
        return [keys, values, key_scales, value_scales]

    def _write(self, staged: Arriving, runs: list[tuple[int, int, int]]) -> None:
        for held, lying in zip(self._parts().values(), staged.on_host(), strict=True):
            chunks = lying.permute(1, 2, 0, 3, 4)
            for source, slot, count in runs:  # a slice is copied faster than an index, and most slots are neighbours
                held[:, :, slot : slot + count].copy_(chunks[:, :, source : source + count])

    def read(self, slots: Tensor, real: Tensor) -> Sequence[Tensor]:
        """Keys and values (L, R, H, k * C, D) of slots (R, k), on the device; zeros where ``real`` (R, k) is false."""
        return self._read(slots, real) if self.where == "device" else self.read_ahead(slots, real).result().on_device()

    def read_ahead(self, slots: Tensor, real: Tensor) -> Future[Arriving]:
        """:meth:`read` beside the caller, once all is there that is being written now."""
        return self._line.ask(self._read_beside, slots, real)

    def _read_beside(self, slots: Tensor, real: Tensor) -> Arriving:
        with self._transfer.queue():
            return Arriving(self._read(slots, real), self.device, self._transfer.stream)

    def _read(self, slots: Tensor, real: Tensor) -> list[Tensor]:
        rows, k = slots.shape
        layers, heads, _, chunk_size, size = self.keys.shape
        missing = (~real).flatten().nonzero().flatten()
        places = slots.flatten()
        if self.where == "device":
            places = sent(places, self.device)
        picked = []
        for i, held in enumerate((self.keys, self.values)):
            chunks = self._pick(held, places)
            if self._scales:
                chunks = (chunks.float() * self._pick(self._scales[i], places)).to(self.given)
            if len(missing):  # masked tokens must still be finite: 0 x NaN is NaN
                chunks.index_fill_(2, sent(missing, chunks.device), 0)
            picked.append(chunks.view(layers, heads, rows, k * chunk_size, size).transpose(1, 2))
        return picked

    def _pick(self, held: Tensor, places: Tensor) -> Tensor:
        if self.where == "device":
            return held.index_select(2, places)
        return self._transfer.pick(held, 2, places)

    def settle(self) -> None:
        """Wait for what is still being read or written."""
        self._line.settle()

    def copy_from(self, other: "ChunkStorage", start: int, at: int, count: int) -> None:
        """Copy ``count`` slots of another storage of the same sizes, from ``start`` on, to ``at``."""
        for storage in (self, other):
            storage.settle()
        for name, mine in self._parts().items():
            mine[:, :, at : at + count].copy_(other._parts()[name][:, :, start : start + count])

    def _parts(self) -> dict[str, Tensor]:
        scales = dict(zip(("key_scales", "value_scales"), self._scales, strict=False))
        return {"keys": self.keys, "values": self.values, **scales}

    def take(self, slots: Tensor) -> dict[str, Tensor]:
        """What the slots (n,) hold, as it is stored, on the CPU: keys, values, and their scales if there are any."""
        self.settle()
        return {name: t.index_select(2, slots.to(t.device)).cpu() for name, t in self._parts().items()}

    def put(self, slots: Tensor, saved: dict[str, Tensor]) -> None:
        """Write back what :meth:`take` gave."""
        self.settle()
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
