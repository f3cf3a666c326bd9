"""Hugging Face decoders: loaded, their layers chosen, frozen and tuned."""

from lightning_memlong.backbone.compiling import compile_layers, leave_uncompiled
from lightning_memlong.backbone.layers import choose_layers, layer_index, text_config, unlimited_layers
from lightning_memlong.backbone.lm_head import Head
from lightning_memlong.backbone.loading import (
    PACKAGED,
    file_beside,
    first_token,
    load_backbone,
    load_tokenizer,
    resolve_backbone,
)
from lightning_memlong.backbone.rope import FAMILIES, Rotary, memory_positions
from lightning_memlong.backbone.transformers_private import (
    attention_of,
    cache_layers,
    gradient_checkpointing,
    new_cache,
)
from lightning_memlong.backbone.tuning import Tuning, describe, spans

__all__ = [
    "FAMILIES",
    "PACKAGED",
    "Head",
    "Rotary",
    "Tuning",
    "attention_of",
    "cache_layers",
    "choose_layers",
    "compile_layers",
    "describe",
    "file_beside",
    "first_token",
    "gradient_checkpointing",
    "layer_index",
    "leave_uncompiled",
    "load_backbone",
    "load_tokenizer",
    "memory_positions",
    "new_cache",
    "resolve_backbone",
    "spans",
    "text_config",
    "unlimited_layers",
]
