"""Where keys and values of chunks lie: one preallocated pair of tensors, written once a chunk, never moved.

Legend: L layers, H key/value heads, R rows, S slots a row, C tokens of a chunk, D head size.
"""

import torch
from torch import Tensor


class ChunkStorage:
    """Slots for keys and values, (L, H, R * S, C, D) each.

    Args:
        keys_like: (L, H, 1, C, D) or anything with these sizes: gives layers, heads, chunk and head size.
        slots: R * S.
        dtype: Element type.
        device: Where they live.
    """

    def __init__(self, keys_like: torch.Size, slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        layers, heads, _, chunk_size, size = keys_like
        # Not zeroed: the pages of a long bank that are never filled are never touched.
        self.keys = torch.empty(layers, heads, slots, chunk_size, size, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    @property
    def device(self) -> torch.device:
        """Where keys and values live."""
        return self.keys.device

    def fits(self, chunks: torch.Size) -> bool:
        """Whether chunks (L, H, n, C, D) have the stored ones' layers, heads, chunk and head size."""
        return chunks[:2] + chunks[3:] == self.keys.shape[:2] + self.keys.shape[3:]

    def write(self, keys: Tensor, values: Tensor, sources: Tensor, slots: Tensor) -> None:
        """Copy chunks ``sources`` (m,) of keys and values (L, H, n, C, D) into ``slots`` (m,)."""
        for held, new in ((self.keys, keys), (self.values, values)):
            chosen = new.detach().index_select(2, sources.to(new.device))
            held.index_copy_(2, slots.to(held.device), chosen.to(held.device, held.dtype))

    def read(self, slots: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (L, R, H, k * C, D) of slots (R, k); zeros where ``real`` (R, k) is false."""
        rows, k = slots.shape
        layers, heads, _, chunk_size, size = self.keys.shape
        missing = (~real).flatten().nonzero().flatten().to(self.device)
        picked = []
        for held in (self.keys, self.values):
            chunks = held.index_select(2, slots.flatten().to(self.device))
            if len(missing):  # masked tokens must still be finite: 0 x NaN is NaN
                chunks.index_fill_(2, missing, 0)
            picked.append(chunks.view(layers, heads, rows, k * chunk_size, size).transpose(1, 2))
        return picked[0], picked[1]


def as_chunks(window: Tensor, chunk_size: int) -> Tensor:
    """Keys or values of windows (L, R, H, T, D) as chunks (L, H, R * n, C, D), row by row."""
    layers, rows, heads, tokens, size = window.shape
    return window.transpose(1, 2).reshape(layers, heads, rows * tokens // chunk_size, chunk_size, size)
