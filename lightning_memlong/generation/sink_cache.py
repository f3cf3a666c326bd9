"""Keys and values of the local context, of all layers; its older part can be taken out.

Legend: B sequences side by side, T tokens, H_kv key/value heads, D head size.
"""

from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.backbone import cache_layers, new_cache
from lightning_memlong.errors import UserError
from lightning_memlong.model import MemLongModel


class SinkCache:
    """A cache whose first tokens stay for good: decoders park attention on them (sinks), and fall apart without.

    (StreamingLLM, arXiv 2309.17453.)

    Args:
        model: Whose keys and values.
        sinks: How many tokens stay [tokens].

    Raises:
        UserError: If keys of one of its layers cannot be turned, so that nothing could be taken out.
    """

    def __init__(self, model: MemLongModel, sinks: int = 1) -> None:
        unknown = sorted(set(range(model.config.num_hidden_layers)) - model.rotary.recognised)
        if unknown:
            raise UserError(
                f"model.backbone: keys of layers {unknown} of {type(model.backbone).__name__} cannot be rotated back "
                "by its rotary tables. Allowed: backbones whose keys can. Fix: choose another for writing."
            )
        self._model, self._sinks = model, sinks
        self.of_backbone = new_cache(model.config.num_hidden_layers)
        """What the decoder is given."""

    @property
    def _layers(self) -> list[Any]:
        """Of each layer ``keys`` and ``values`` (B, H_kv, T, D), rotated."""
        return cache_layers(self.of_backbone)

    @property
    def length(self) -> int:
        """Tokens in it."""
        return int(self.of_backbone.get_seq_length())

    def copy(self) -> "SinkCache":
        """The same keys and values, to go on with in another way."""
        other = copy(self)
        other.of_backbone = deepcopy(self.of_backbone)
        return other

    def reorder(self, order: Tensor) -> None:
        """Let the sequences be those of ``order`` (B,)."""
        self.of_backbone.batch_select_indices(order)

    def unrotated_kv(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Unrotated keys and values of the positions from ``begin`` to before ``end``, as a bank stores them."""
        layers = self._layers
        found = {n: (layers[n].keys, layers[n].values) for n in self._model.stored_layers}
        return self._model.contexts.unrotate_kv(found, begin, end)

    def evict(self, end: int, reach: int) -> None:
        """Take out what lies between the sinks and position ``end``, and turn what follows to where it then is.

        Args:
            end: The position of what follows.
            reach: The last position there will be.
        """
        rotary, sinks = self._model.rotary, self._sinks
        for number, layer in enumerate(self._layers):
            keys = layer.keys[:, :, end:]
            steps = torch.arange(keys.shape[2], device=keys.device)[None]
            plain = rotary.unrotate(keys[None], end + steps, [number])
            turned = rotary.rotate(plain, sinks + steps, [number], reach)[0].to(keys.dtype)
            layer.keys = torch.cat([layer.keys[:, :, :sinks], turned], dim=2)
            layer.values = torch.cat([layer.values[:, :, :sinks], layer.values[:, :, end:]], dim=2)
