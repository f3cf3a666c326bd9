"""The record a bank hands to a model. R rows, k chunks of C tokens, M = k * C, L layers, H heads, D head size."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Retrieved:
    """What a bank gathered for one window, in document order. Nothing in it is ever modified."""

    keys: Tensor
    """(R, H, M, D) before rotary embedding; (L, R, H, M, D) from a bank of several layers."""
    values: Tensor
    """Shaped as ``keys``."""
    mask: Tensor
    """(R, M) bool, true where a token is real."""
    scores: Tensor
    """(R, k) float32 similarity; NaN where nothing was retrieved or the selection has no score."""
    entries: Tensor
    """(R, k) places of the entries in their rows, oldest = 0; -1 where nothing was retrieved."""
    positions: Tensor
    """(R, k) first token of each chunk in its document [tokens]; -1 where nothing was retrieved."""
