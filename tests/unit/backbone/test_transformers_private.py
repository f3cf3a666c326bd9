"""What is used of transformers beyond its documented interface is still there, and means what it meant."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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


@pytest.mark.parametrize("by_type", [False, True])
def test_a_dynamic_table_is_settled_for_a_length(by_type: bool) -> None:
    """Whatever is read first, the angles are those of the whole text."""
    dynamic = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e4}
    if by_type:
        types = {"full_attention": dynamic, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        config = Gemma3TextConfig(head_dim=8, max_position_embeddings=16, rope_parameters=types)
        module, names = Gemma3RotaryEmbedding(config), (["full_attention"], ["sliding_attention"])
    else:
        module = LlamaRotaryEmbedding(LlamaConfig(head_dim=8, max_position_embeddings=16, rope_parameters=dynamic))
        names = ([], [])
    places, x = torch.arange(40)[None], torch.empty(0)
    wanted = module(x, places, *names[0])
    transformers_private.settle_dynamic(module, 40)
    for part in (places[:, :10], places[:, 30:], places):  # shorter than it was made for, one that is longer, all
        for table, whole in zip(module(x, part, *names[0]), wanted, strict=True):
            assert torch.equal(table, whole[:, part[0]])
    if by_type:
        assert not torch.equal(module(x, places, *names[1])[0], wanted[0])
