"""A text that grows, read by the backbone without memory: whole, or through a window that slides over it.

Legend: B sequences side by side, T tokens, E hidden size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.backbone import new_cache
from lightning_memlong.generation.sink_cache import SinkCache
from lightning_memlong.model import ForwardContext, MemLongModel, decode


@dataclass(frozen=True)
class Sliding:
    """A window that slides over a text, and the first tokens that stay (StreamingLLM, arXiv 2309.17453)."""

    sinks: int
    """[tokens]"""
    window: int
    """Those being read included [tokens]."""
    stride: int
    """Read at once [tokens]."""


class PlainContext:
    """A text that grows, with its cache.

    Args:
        model: Its backbone reads.
        autocast: Context in which it computes.
        sliding: What of the text stays in the cache; None: all of it.

    Raises:
        UserError: If nothing can be taken out of the cache of this backbone.
    """

    def __init__(
        self, model: MemLongModel, autocast: Callable[[], AbstractContextManager[Any]], sliding: Sliding | None = None
    ) -> None:
        self._model, self._autocast, self._sliding = model, autocast, sliding
        self._sinks = None if sliding is None else SinkCache(model, sliding.sinks)
        self._cache = self._sinks.of_backbone if self._sinks else new_cache(model.config.num_hidden_layers)
        self.length = 0
        """Tokens read so far."""

    def fork(self) -> "PlainContext":
        """The same text, to be gone on with in another way."""
        other = copy(self)
        other._sinks = None if self._sinks is None else self._sinks.copy()
        other._cache = deepcopy(self._cache) if other._sinks is None else other._sinks.of_backbone
        return other

    def close(self) -> None:
        """As :meth:`LocalContext.close`; nothing of this text lies elsewhere."""

    @torch.no_grad()
    def read(self, ids: Tensor, last: int) -> Tensor:
        """Hidden states (B, last, E) of the last of the tokens (B, T) that come next; fewer, where T is less."""
        if self.length == 0 and self._model.bos is not None:
            ids = torch.cat([ids.new_full((len(ids), 1), self._model.bos), ids], dim=1)
        kept = ids.new_empty(len(ids), 0, self._model.config.hidden_size, dtype=torch.float32)
        begin = 0
        for size in self._pieces(ids.shape[1]):
            self._make_room(size)
            with self._autocast():
                piece = ids[:, begin : begin + size]
                hidden = decode(self._model.backbone, piece, ForwardContext(), self._cache)[:, -last:]
            kept = torch.cat([kept.to(hidden.dtype), hidden], dim=1)[:, -last:]
            begin += size
        self.length += begin
        return kept

    def logits(self, ids: Tensor, last: int = 1, goes_on: bool = False) -> Tensor:
        """Next-token logits (B, last, V) at the end of a text (B, T) that goes on from the one before.

        Args:
            ids: The whole text.
            last: At how many of its tokens, of those that are new.
            goes_on: As in :class:`GenerateAdapter`; here it always does.
        """
        first = int(self._model.bos is not None and self.length > 0)  # the model's own, which is not in the text
        hidden = self.read(ids[:, self.length - first :], last)
        with self._autocast():
            return self._model.head.logits(hidden)

    def _pieces(self, count: int) -> list[int]:
        """How many tokens are read at once, one number a pass; the first ones take what leaves whole strides."""
        if (s := self._sliding) is None:
            return [count]
        most = s.stride if self.length else s.sinks + s.window
        steps = max(0, -(-(count - most) // s.stride))
        return [count - steps * s.stride] + [s.stride] * steps

    def _make_room(self, count: int) -> None:
        """Take the oldest out of the cache, but the sinks, if so many more do not fit."""
        s, cache = self._sliding, self._sinks
        if s is not None and cache is not None and cache.length + count > s.sinks + s.window:
            cache.evict(cache.length - (s.window - s.stride), s.sinks + s.window)
