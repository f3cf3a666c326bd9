"""Real classes of every supported family, tiny and random: the plain model where memory is empty, memory above.

Keys are compared with an independent way to the same thing: for a layer's input, memory made of the window before it
must read exactly as if the plain model had seen both windows at once (sequential positions, every layer its own).
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_memlong.bank import Retrieved
from lightning_memlong.errors import UserError
from lightning_memlong.model import MemLong
from lightning_memlong.rotary import FAMILIES

COMMON = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "initializer_range": 0.3}  # fmt: skip
MODELS = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Phi-3": ("phi3", {}),
    "OLMo 2": ("olmo2", {}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "Granite": ("granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
}
TOKENS = 12


def build(family: str) -> torch.nn.Module:
    name, extra = MODELS[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(COMMON | extra))).eval()


def test_the_list_of_families_is_the_tested_one() -> None:
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize("family", MODELS)
def test_family(family: str) -> None:
    ids = torch.randint(3, 61, (2, 2 * TOKENS), generator=torch.Generator().manual_seed(1))
    first, second = ids[:, :TOKENS], ids[:, TOKENS:]
    plain = build(family)
    with torch.no_grad():
        expected = plain(second).logits
        whole = plain(ids).logits[:, TOKENS:]
    model = MemLong(build(family), memory_layer=0, source="per_layer", position="sequential").eval()
    assert torch.equal(model(second).logits, expected)
    stored = model(first)
    nothing = torch.zeros(2, 1)
    memory = Retrieved(stored.keys, stored.values, torch.ones(2, TOKENS, dtype=torch.bool), nothing, nothing, nothing)
    read = model(second, memory=memory).logits
    if family == "Mistral":  # its window of 8 tokens hides part of the context from the plain model, not from memory
        assert (read - expected).abs().max() > 1e-3
    else:
        torch.testing.assert_close(read, whole, atol=5e-4, rtol=1e-3)
    assert torch.equal(model.unwrap()(second).logits, expected)


REFUSED = [
    ("stablelm", {}),
    ("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 16}),
    ("gpt_neox", {}),
    ("gemma2", {"head_dim": 8}),
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
    assert model.config._attn_implementation == before
