"""Hugging Face decoders: loaded, their layers chosen, frozen and tuned."""

from lightning_memlong.backbone.layers import choose_layers, layer_index, text_config, unlimited_layers
from lightning_memlong.backbone.lm_head import Head
from lightning_memlong.backbone.loading import first_token, load_backbone, load_tokenizer, resolve_backbone
from lightning_memlong.backbone.rope import FAMILIES, Rotary, memory_positions
from lightning_memlong.backbone.transformers_private import attention_of, cache_layers, gradient_checkpointing
from lightning_memlong.backbone.tuning import Tuning, describe, spans

__all__ = [
    "FAMILIES",
    "Head",
    "Rotary",
    "Tuning",
    "attention_of",
    "cache_layers",
    "choose_layers",
    "describe",
    "first_token",
    "gradient_checkpointing",
    "layer_index",
    "load_backbone",
    "load_tokenizer",
    "memory_positions",
    "resolve_backbone",
    "spans",
    "text_config",
    "unlimited_layers",
]
