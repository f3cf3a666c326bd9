"""What is used of transformers beyond its documented interface is still there, and means what it meant."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GraniteConfig

from lightning_memlong.backbone import transformers_private
from tests.conftest import tiny_llama


def test_attention_of_names_the_implementation() -> None:
    backbone = tiny_llama()
    before = transformers_private.attention_of(backbone)
    backbone.set_attn_implementation("eager")
    assert before != "eager" and transformers_private.attention_of(backbone) == "eager"


def test_gradient_checkpointing_is_switched_on_and_off() -> None:
    backbone = tiny_llama().train()
    for on in (True, False):
        transformers_private.gradient_checkpointing(backbone, on)
        assert backbone.is_gradient_checkpointing is on


def test_rotary_parts_turn_keys() -> None:
    parts = transformers_private.rotary_parts(tiny_llama())
    assert parts is not None and not parts.by_type and parts.scale("") == 1.0
    cos, sin = parts.module(torch.empty(0), torch.arange(3)[None])
    keys = torch.randn(1, 2, 3, cos.shape[-1])
    turned = parts.apply(keys[:, :0], keys, cos, sin)[1]
    assert torch.equal(turned[:, :, 0], keys[:, :, 0]) and not torch.equal(turned[:, :, 1], keys[:, :, 1])


def test_logits_shape_reads_what_families_do() -> None:
    assert transformers_private.logits_shape(tiny_llama().config) == (1.0, None)
    assert transformers_private.logits_shape(GraniteConfig(logits_scaling=8.0)) == (8.0, None)


def test_cache_layers_may_be_set() -> None:
    cache = DynamicCache()
    keys = torch.randn(1, 2, 3, 4)
    cache.update(keys, keys, 0)
    layer = transformers_private.cache_layers(cache)[0]
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, keys)
    layer.keys = layer.values = keys[:, :, :2]
    assert cache.get_seq_length() == 2


def test_the_registered_attention_functions_are_found_by_name() -> None:
    assert callable(AttentionInterface()["sdpa"]) and callable(AttentionMaskInterface()["sdpa"])
