"""Real classes of every supported family, tiny and random: the plain model where memory is empty, memory above.

Reading memory is compared with an independent way to the same thing: with memory made of the window before it, a window
must read exactly as if the plain model had seen both at once (sequential positions, every layer its own).
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_memlong.backbone import FAMILIES
from lightning_memlong.backbone.rope import UNTURNED
from lightning_memlong.bank import Retrieved
from lightning_memlong.config import ModelConfig
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong

COMMON = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "initializer_range": 0.3, "max_position_embeddings": 128}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA = {"head_dim": 8, "layer_types": MIXED, "sliding_window": 256, "query_pre_attn_scalar": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, YaRN": ("llama", {"rope_parameters": YARN}),
    "Llama 3": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
                          "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "Llama, 100 a head": ("llama", {"head_dim": 100, "num_key_value_heads": 4}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Gemma 2": ("gemma2", GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}),
    "Gemma 3 (text)": ("gemma3_text", GEMMA),
    "Phi-3": ("phi3", {}),
    "Phi-3, partial rotary": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                           "partial_rotary_factor": 0.5}}),
    "OLMo 2": ("olmo2", {}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "Granite": ("granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
}  # fmt: skip
ROWS, TOKENS = 2, 12


def build(family: str, **changes: Any) -> PreTrainedModel:
    name, extra = MODELS[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(COMMON | extra | changes))).eval()


def windows() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 61, (ROWS, 2 * TOKENS), generator=torch.Generator().manual_seed(1))
    return ids[:, :TOKENS], ids[:, TOKENS:]


def remembered(stored: Any, chunks: int = 1) -> Retrieved:
    nothing = torch.zeros(ROWS, chunks)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    return Retrieved(stored.keys, stored.values, mask, nothing, nothing, nothing)


def same(family: str, a: Tensor, b: Tensor) -> None:
    """To the last bit; soft-capped attention is computed by another kernel than the plain model's."""
    if family == "Gemma 2":
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    else:
        assert torch.equal(a, b)


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) <= set(MODELS)


@pytest.mark.parametrize("family", MODELS)
def test_empty_bank_is_the_backbone_and_unwrap_gives_it_back(family: str) -> None:
    window = windows()[0]
    plain = build(family)
    expected = plain(window).logits
    backbone = build(family)
    implementation = backbone.config._attn_implementation
    model = MemLong(backbone, memory_layer=1).eval()
    same(family, model(window).logits, expected)
    loss = model(window, labels=window).loss
    torch.testing.assert_close(loss, plain(window, labels=window).loss, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.unwrap()(window).logits, expected)
    assert (
        backbone.config._attn_implementation == implementation
        and not backbone.get_decoder().rotary_emb._forward_pre_hooks
    )


@pytest.mark.parametrize("position", ["sequential", "fixed"])
@pytest.mark.parametrize("family", MODELS)
def test_memory_reads_as_the_text_it_was_made_of(family: str, position: str) -> None:
    """Whatever the position, if with fixed all of it is near."""
    first, second = windows()
    whole = build(family)(torch.cat([first, second], 1)).logits[:, TOKENS:]
    model = MemLong(
        build(family), memory_layer=0, retrieval_layers=[0, 1, 2, 3], position=position, memory_near=12
    ).eval()
    with torch.no_grad():
        output = model(second, memory=remembered(model(first), chunks=3))
    torch.testing.assert_close(output.logits, whole, atol=5e-4, rtol=1e-3)
    assert set(output.attention_mass) == {0, 1, 2, 3}
    assert all(m.shape == (ROWS, 4) and 0 < m.min() and m.max() < 1 for m in output.attention_mass.values())


@pytest.mark.parametrize("source", ["single", "per_layer"])
@pytest.mark.parametrize("family", MODELS)
def test_memory_changes_nothing_below_the_first_retrieval_layer(family: str, source: str) -> None:
    first, second = windows()
    model = MemLong(build(family), memory_layer=1, retrieval_layers=[2, 3], source=source).eval()
    inputs: dict[tuple[bool, int], Tensor] = {}
    for i, layer in enumerate(model.backbone.get_decoder().layers):
        layer.register_forward_pre_hook(lambda _m, args, i=i: inputs.__setitem__((present, i), args[0]))
    present = False
    plain = model(second).logits
    memory = remembered(model(first))
    plain = model(second).logits
    present = True
    logits = model(second, memory=memory).logits
    assert all(torch.equal(inputs[False, i], inputs[True, i]) for i in (0, 1, 2))
    assert not torch.equal(inputs[False, 3], inputs[True, 3]) and (logits - plain).abs().max() > 1e-3


def true_keys(model: MemLong, layer: int, window: Tensor) -> Tensor:
    """Unrotated keys (B, H_kv, T, D) straight from the projection, and from the key norm where there is one."""
    attention = model.backbone.get_decoder().layers[layer].self_attn
    config = model.backbone.config
    heads, size = config.num_key_value_heads, attention.head_dim
    name = next(n for n in ("k_norm", "k_proj", "qkv_proj") if isinstance(getattr(attention, n, None), nn.Module))
    seen: list[Tensor] = []
    hook = getattr(attention, name).register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(window)
    hook.remove()
    out = seen[0]
    if name == "qkv_proj":  # [queries | keys | values] in one projection
        start = config.num_attention_heads * size
        out = out[..., start : start + heads * size]
    if out.dim() == 4:  # a norm a head
        return out if out.shape[1] == heads else out.transpose(1, 2)
    return out.unflatten(-1, (heads, size)).transpose(1, 2)


@pytest.mark.parametrize("family", MODELS)
def test_stored_keys_are_the_unrotated_ones(family: str) -> None:
    window = windows()[0]
    model = MemLong(build(family), memory_layer=0, retrieval_layers=[0, 1, 2, 3]).eval()
    stored = model(window).keys
    for layer in range(4):
        torch.testing.assert_close(stored[layer], true_keys(model, layer, window), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("source", ["single", "per_layer"])
@pytest.mark.parametrize("fusion", ["joint", "gated"])
@pytest.mark.parametrize("family", ["Llama", "Gemma 2", "Gemma 3 (text)"])
def test_a_first_token_before_the_window_is_there_and_nowhere_to_be_seen(family: str, fusion: str, source: str) -> None:
    first, second = windows()
    plain, bos = build(family), torch.full((ROWS, 1), 1)
    expected = plain(torch.cat([bos, second], 1))
    model = MemLong(build(family), ModelConfig(1, [1, 2, 3], source, fusion), bos=1).eval()
    output = model(second, labels=second)
    same(family, output.logits, expected.logits[:, 1:])
    assert output.loss is not None and output.keys.shape[-2] == TOKENS
    without = MemLong(build(family), ModelConfig(1, [1, 2, 3], source, fusion)).eval()(torch.cat([bos, second], 1))
    torch.testing.assert_close(output.keys, without.keys[..., 1:, :], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.values, without.values[..., 1:, :])
    for gate in model.gates.values():
        gate.data.fill_(0.5)
    grouped = remembered(model(first))
    assert (model(second, memory=grouped).logits - output.logits).abs().max() > 1e-3
    # One set for both halves of a row, or the same set for each: the same.
    twice = Retrieved(*(t.repeat_interleave(2, dim=-4 if i < 2 else 0)
                        for i, t in enumerate(list(vars(grouped).values())[:6])))  # fmt: skip
    torch.testing.assert_close(
        model(second, memory=twice).logits, model(second, memory=grouped).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["Gemma 2", "Gemma 3 (text)"])
def test_layers_that_see_a_window_only_are_left_out_unless_named(family: str) -> None:
    assert MemLong(build(family), memory_layer=0).retrieval_layers == [1, 3]
    assert MemLong(build(family), memory_layer=0, retrieval_layers=[0, 1]).retrieval_layers == [0, 1]
    only = build(family, layer_types=["sliding_attention"] * 4)
    assert MemLong(only, memory_layer=1).retrieval_layers == [1, 2, 3], "there is no other layer"


@pytest.mark.parametrize("family", ["Mistral", "Gemma 2", "Gemma 3 (text)"])
def test_a_sliding_window_hides_local_text_but_not_memory(family: str) -> None:
    first, second = windows()
    short = {"sliding_window": 4}
    plain = build(family, **short)(second).logits
    assert not torch.allclose(plain, build(family)(second).logits, atol=1e-3)
    model = MemLong(build(family, **short), memory_layer=0, retrieval_layers=[0, 1, 2, 3]).eval()
    same(family, model(second).logits, plain)
    assert (model(second, memory=remembered(model(first))).logits - plain).abs().max() > 1e-3


def test_layers_have_the_tables_they_were_trained_with() -> None:
    gemma = MemLong(build("Gemma 3 (text)"), memory_layer=0, retrieval_layers=[0, 1, 2, 3]).rotary
    assert [gemma.table(i) for i in range(4)] == MIXED
    smol = MemLong(build("SmolLM3"), memory_layer=0).rotary
    assert [smol.table(i) == UNTURNED for i in range(4)] == [False, True, False, True]


def test_large_biases_of_dimensions_that_hardly_turn_do_not_hide_the_others() -> None:
    """As in real Qwen2 checkpoints."""
    backbone = build("Qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    for layer in backbone.model.layers:
        layer.self_attn.k_proj.bias.data[7], layer.self_attn.k_proj.bias.data[15] = 100.0, -60.0
    model = MemLong(backbone, memory_layer=0, retrieval_layers=[0, 1, 2, 3]).eval()
    assert {model.rotary.table(i) for i in range(4)} == {""}
    stored = model(windows()[0]).keys
    for layer in range(4):
        torch.testing.assert_close(stored[layer], true_keys(model, layer, windows()[0]), atol=1e-4, rtol=1e-4)


def test_tables_that_depend_on_the_length_are_those_of_the_window_that_reads() -> None:
    """Phi-3's long form takes other frequencies once a text is longer than what it was trained on first."""
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
               "original_max_position_embeddings": 8}  # fmt: skip
    settings = {"rope_parameters": scaling, "max_position_embeddings": 64, "original_max_position_embeddings": 8}
    first, second = windows()
    whole = build("Phi-3", **settings)(torch.cat([first, second], 1)).logits[:, TOKENS:]
    model = MemLong(
        build("Phi-3", **settings), memory_layer=0, retrieval_layers=[0, 1, 2, 3], position="sequential"
    ).eval()
    read = model(second, memory=remembered(model(first))).logits
    torch.testing.assert_close(read, whole, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["Llama", "Gemma 2", "Qwen3"])
def test_a_backbone_in_bfloat16_is_wrapped_too(family: str) -> None:
    backbone = build(family).to(torch.bfloat16)
    backbone.set_attn_implementation("eager")
    model = MemLong(backbone, memory_layer=1).eval()
    first, second = windows()
    with torch.no_grad():
        stored = model(first)
        assert stored.keys.dtype == torch.bfloat16
        assert torch.isfinite(model(second, memory=remembered(stored)).logits).all()


def test_the_language_part_of_a_model_that_sees_pictures() -> None:
    text = COMMON | GEMMA
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    both = AutoModelForCausalLM.from_config(config).eval()
    first, second = windows()
    expected = both(input_ids=second).logits
    model = MemLong(both, memory_layer=1).eval()
    torch.testing.assert_close(model(second).logits, expected, atol=1e-5, rtol=1e-5)
    assert (model(second, memory=remembered(model(first))).logits - expected).abs().max() > 1e-3


REFUSED = [
    ("stablelm", {}),
    ("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 16}),
    ("gpt_neox", {}),
    ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
]


@pytest.mark.parametrize(("name", "extra"), REFUSED)
def test_a_family_that_drops_the_memory_is_refused_by_name(name: str, extra: dict[str, int]) -> None:
    config = AutoConfig.for_model(name, **(COMMON | extra if name != "gpt2" else {"vocab_size": 61, **extra}))
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(UserError) as error:
        MemLong(model, memory_layer=0)
    message = str(error.value)
    assert type(model).__name__ in message and ("Llama" in message) and "Fix:" in message
    assert all(family in message for family in FAMILIES)
    assert model.config._attn_implementation == before
