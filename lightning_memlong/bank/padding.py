"""Rows that found different numbers of entries, as one tensor."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(found: list[Tensor], missing: float) -> Tensor:
    """R tensors (k_r,) as (R, max k)."""
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=missing)


def padded_stack(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """R tensors (G, k_r) as (R, G, max k)."""
    widest = max(t.shape[1] for t in tensors)
    return torch.stack([F.pad(t, (0, widest - t.shape[1]), value=fill) for t in tensors])
