"""What one pass over a window gives."""

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


class MemLongOutput:
    """Loss at once; logits, keys and values when they are asked for, so that who does not need them does not pay.

    Args:
        loss: Mean next-token loss over labelled tokens, float32; None without labels.
        hidden: (B, T or logits_to_keep, E), the decoder's last hidden states.
        to_logits: Makes logits of them.
        to_store: Makes keys and values for the bank.
        attention_mass: Layer -> share of its attention that went to memory, (B, H), mean over tokens, float32; only
            layers whose kernel told it.
        memory_hidden: (B, T, E), the memory layer's hidden states, detached.
        chunk_use: (R, k), share of attention that each retrieved chunk got, mean over retrieval layers, heads and a
            sample of the tokens, float32; None where nobody asked or nothing was retrieved.
    """

    def __init__(
        self,
        loss: Tensor | None,
        hidden: Tensor,
        to_logits: Callable[[Tensor], Tensor],
        to_store: Callable[[], tuple[Tensor, Tensor]],
        attention_mass: Mapping[int, Tensor],
        memory_hidden: Tensor,
        chunk_use: Tensor | None = None,
    ) -> None:
        self.memory_hidden, self.chunk_use = memory_hidden, chunk_use
        self.loss, self.hidden, self.attention_mass = loss, hidden, attention_mass
        self._to_logits = to_logits
        self._to_store: Callable[[], tuple[Tensor, Tensor]] | None = to_store

    @cached_property
    def logits(self) -> Tensor:
        """(B, T or logits_to_keep, vocabulary)."""
        return self._to_logits(self.hidden)

    def token_losses(self, labels: Tensor, block: int = 256) -> Tensor:
        """(B, T) next-token losses, float32; 0 where ``labels`` (B, T) are -100. A block of positions at a time."""
        losses = torch.zeros(labels.shape, device=self.hidden.device)
        for start in range(0, labels.shape[1] - 1, block):
            wanted = labels[:, 1:][:, start : start + block]
            logits = self._to_logits(self.hidden[:, start : start + wanted.shape[1]]).float()
            found = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            losses[:, start + 1 : start + 1 + wanted.shape[1]] = found.view_as(wanted)
        return losses

    @cached_property
    def _stored(self) -> tuple[Tensor, Tensor]:
        if self._to_store is None:
            raise RuntimeError("keys and values were dropped (drop_kv): ask for them before")
        with torch.no_grad():
            return self._to_store()

    def drop_kv(self) -> None:
        """Free the keys and values, for who keeps the output for its losses; asking for them fails from here on."""
        self._to_store = None
        self.__dict__.pop("_stored", None)

    @property
    def keys(self) -> Tensor:
        """The window's keys before rotary embedding, detached.

        (B, H_kv, T, D) for source ``single``, (layers, B, H_kv, T, D) for ``per_layer``.
        """
        return self._stored[0]

    @property
    def values(self) -> Tensor:
        """The window's values, shaped as ``keys``."""
        return self._stored[1]
