"""What is used of transformers beyond its documented interface, in one place, so that one place breaks.

Tested by name in ``tests/unit/backbone/test_transformers_private.py``; the rest of the project asks here.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ApplyRotary = Callable[..., tuple[Tensor, Tensor]]


def attention_of(backbone: PreTrainedModel) -> str:
    """Name of the attention implementation in use.

    Needs ``config._attn_implementation``; there is a public setter (``set_attn_implementation``) but no getter.
    """
    return backbone.config._attn_implementation


def gradient_checkpointing(backbone: PreTrainedModel, on: bool) -> None:
    """Switch recomputation of layers in the backward pass.

    Needs ``gradient_checkpointing_enable`` and ``_disable``, or ``activation_checkpointing_*`` as releases to come
    call them.
    """
    what = "enable" if on else "disable"
    name = f"activation_checkpointing_{what}"
    switch = getattr(backbone, name if hasattr(backbone, name) else f"gradient_checkpointing_{what}")
    switch({"use_reentrant": False}) if on else switch()


@dataclass(frozen=True)
class RotaryParts:
    """A decoder's rotary embedding."""

    module: nn.Module
    """Gives cosines and sines of positions."""
    apply: ApplyRotary
    """``apply_rotary_pos_emb(q, k, cos, sin)`` of its modelling file."""
    by_type: bool
    """Whether there is a table of angles for each type of layer."""

    def scale(self, table: str) -> float:
        """Factor on a table's cosines and sines (YaRN); needs ``attention_scaling`` or ``{type}_attention_scaling``."""
        return float(getattr(self.module, f"{table}_attention_scaling".lstrip("_"), 1.0))


def rotary_parts(backbone: PreTrainedModel) -> RotaryParts | None:
    """A decoder's rotary embedding; None where it is not laid out as transformers' own families are.

    Needs ``decoder.rotary_emb`` (with its tables as buffers), ``decoder.layers``, ``decoder.norm``, and
    ``apply_rotary_pos_emb`` in the modelling file; the argument ``layer_type`` tells of several tables.
    """
    decoder = backbone.get_decoder()
    module = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    laid_out = hasattr(decoder, "layers") and hasattr(decoder, "norm")
    if module is None or apply is None or not laid_out or not list(module.named_buffers(recurse=False)):
        return None
    return RotaryParts(module, apply, "layer_type" in inspect.signature(module.forward).parameters)


def settle_dynamic(module: nn.Module, tokens: int) -> None:
    """Let a rotary embedding of type ``dynamic`` have the table of so many tokens for good.

    Needs ``rope_type``, a name or one a type of layer, and that a pass over a position changes the table as it should.
    """
    kinds: Any = module.rope_type
    place = torch.tensor([[tokens - 1]], device=next(module.buffers()).device)
    for layer_type in kinds if isinstance(kinds, dict) else [None]:
        module(place.float(), place, *([] if layer_type is None else [layer_type]))
    settled: Any = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    module.rope_type = settled


def logits_shape(config: Any) -> tuple[float, float | None]:
    """What a family does to logits: a divisor (Granite) and a soft cap (Gemma 2); 1 and None where it does nothing.

    Needs ``logits_scaling`` and ``final_logit_softcapping``; that this is all is proved when a model is wrapped.
    """
    return float(getattr(config, "logits_scaling", None) or 1.0), getattr(config, "final_logit_softcapping", None)


def new_cache(layers: int) -> DynamicCache:
    """An empty cache that has its layers; needs ``DynamicCache.layers`` to be a list that grows by itself.

    Left to grow in the first pass, layers that are compiled would be compiled anew for each length of that list. Made
    from a configuration, it would forget what is beyond a sliding window.
    """
    cache = DynamicCache()
    cache.layers.extend(DynamicLayer() for _ in range(layers))
    return cache


def cache_layers(cache: DynamicCache) -> list[Any]:
    """Of each layer ``keys`` and ``values`` (B, H_kv, T, D), which may be set; needs ``DynamicCache.layers``."""
    return cache.layers
