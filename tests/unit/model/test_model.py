"""MemLong on a tiny Llama: invariants 1, 3, 4 and what is frozen."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong.bank import Retrieved
from lightning_memlong.config import TuningConfig
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import context
from lightning_memlong.model.context import ContextFactory
from tests.conftest import tiny_llama

TOKENS, MEMORY, HEADS, SIZE = 16, 8, 2, 8


def wrap(**settings: object) -> MemLong:
    return MemLong(tiny_llama(), **({"memory_layer": 1} | settings)).eval()  # type: ignore[arg-type]


def window(rows: int = 2) -> Tensor:
    return torch.randint(0, 97, (rows, TOKENS), generator=torch.Generator().manual_seed(3))


def memory_for(model: MemLong, rows: int = 2, mask: Tensor | None = None) -> Retrieved:
    mixer = torch.Generator().manual_seed(4)
    layers = [] if model.layout.source == "single" else [len(model.retrieval_layers)]
    keys, values = (torch.randn(*layers, rows, HEADS, MEMORY, SIZE, generator=mixer) for _ in range(2))
    mask = torch.ones(rows, MEMORY, dtype=torch.bool) if mask is None else mask
    nothing = torch.zeros(rows, 2)
    return Retrieved(keys, values, mask, nothing, nothing.long(), nothing.long())


EVERY = [
    (s, f, p) for s in ("single", "per_layer") for f in ("joint", "gated") for p in ("zero", "sequential", "fixed")
]


@pytest.mark.parametrize(("source", "fusion", "position"), EVERY)
def test_empty_bank_is_the_backbone_and_memory_is_not(source: str, fusion: str, position: str) -> None:
    plain = tiny_llama()(window()).logits
    model = wrap(source=source, fusion=fusion, position=position)
    assert torch.equal(model(window()).logits, plain)
    empty = memory_for(model, mask=torch.zeros(2, MEMORY, dtype=torch.bool))
    assert torch.equal(model(window(), memory=empty).logits, plain)
    with_memory = model(window(), memory=memory_for(model)).logits
    if fusion == "gated":
        torch.testing.assert_close(with_memory, plain, atol=1e-5, rtol=0)
        for gate in model.gates.values():
            gate.data.fill_(0.5)
        with_memory = model(window(), memory=memory_for(model)).logits
    assert (with_memory - plain).abs().max() > 1e-3


def test_a_row_without_memory_is_the_backbone_beside_one_with_it() -> None:
    for fusion in ("joint", "gated"):
        model = wrap(fusion=fusion)
        for gate in model.gates.values():
            gate.data.fill_(0.7)
        mask = torch.tensor([[True] * MEMORY, [False] * MEMORY])
        logits = model(window(), memory=memory_for(model, mask=mask)).logits
        torch.testing.assert_close(logits[1], tiny_llama()(window()).logits[1], atol=1e-5, rtol=1e-5)
        assert (logits[0] - tiny_llama()(window()).logits[0]).abs().max() > 1e-3


def test_unwrap_gives_back_the_backbone() -> None:
    for mode in ("full", "lora"):
        backbone = tiny_llama()
        names, flags = [n for n, _ in backbone.named_modules()], [p.requires_grad for p in backbone.parameters()]
        weights = copy.deepcopy(backbone.state_dict())
        model = MemLong(backbone, memory_layer=1, tuning=TuningConfig(mode=mode, lora_rank=2))
        assert [n for n, _ in backbone.named_modules()] != names or mode == "full"
        back = model.unwrap()
        assert back is backbone and [n for n, _ in back.named_modules()] == names
        assert [p.requires_grad for p in back.parameters()] == flags
        assert back.config._attn_implementation == "sdpa" and not back.is_gradient_checkpointing
        assert all(torch.equal(weights[k], v) for k, v in back.state_dict().items())


def test_captured_keys_are_the_unrotated_projections() -> None:
    model = wrap(source="per_layer")
    seen: dict[int, Tensor] = {}
    for layer in model.retrieval_layers:
        module = model.backbone.model.layers[layer].self_attn.k_proj
        module.register_forward_hook(lambda _m, _i, out, layer=layer: seen.__setitem__(layer, out))
    keys = model(window()).keys
    for i, layer in enumerate(model.retrieval_layers):
        expected = seen[layer].view(2, TOKENS, HEADS, SIZE).transpose(1, 2)
        torch.testing.assert_close(keys[i], expected, atol=1e-5, rtol=1e-5)
        assert not keys.requires_grad


def test_retrieved_tokens_read_as_if_they_stood_before_the_window() -> None:
    """With every layer its own K/V and running positions, memory of the previous window is plain context.

    One path: a plain model over both windows. The other: the first window's K/V of all layers as memory of the
    second. They agree to rounding, because unrotating, storing and rotating anew keep relative positions.
    """
    backbone = tiny_llama()
    both = torch.cat([window(), window().flip(1)], dim=1)
    expected = backbone(both).logits[:, TOKENS:]
    model = MemLong(backbone, memory_layer=0, source="per_layer", position="sequential").eval()
    first = model(both[:, :TOKENS])
    nothing = torch.zeros(2, 1)
    memory = Retrieved(first.keys, first.values, torch.ones(2, TOKENS, dtype=torch.bool), nothing, nothing, nothing)
    torch.testing.assert_close(model(both[:, TOKENS:], memory=memory).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("source", ["single", "per_layer"])
@pytest.mark.parametrize("fusion", ["joint", "gated"])
def test_gradient_checkpointing_changes_nothing_with_memory_present(source: str, fusion: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = wrap(source=source, fusion=fusion, gradient_checkpointing=checkpointing).train()
        for gate in model.gates.values():
            gate.data.fill_(0.3)
        memory = memory_for(model)
        before = memory.keys.clone(), memory.values.clone()
        loss = model(window(), window(), memory=memory).loss
        loss.backward()
        assert torch.equal(before[0], memory.keys) and torch.equal(before[1], memory.values)
        assert (loss - model(window(), window()).loss).abs() > 1e-3, "memory must be present"
        results.append({"loss": loss.detach(), **{n: p.grad for n, p in model.trainable().items()}})
        assert model.backbone.is_gradient_checkpointing == checkpointing
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)
    assert len(results[0]) > 10


def test_logits_are_causal_in_the_window() -> None:
    model = wrap()
    memory = memory_for(model)
    changed = window().clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    a, b = model(window(), memory=memory).logits, model(changed, memory=memory).logits
    torch.testing.assert_close(a[:, :9], b[:, :9], atol=1e-6, rtol=0)
    assert (a[:, 9:] - b[:, 9:]).abs().max() > 1e-3


TRAINED = {
    "full": {f"backbone.model.layers.{i}.{n}.weight" for i in (2, 3) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
        "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
    )} | {"backbone.model.norm.weight"},
    "lora": {f"backbone.model.layers.{i}.self_attn.{n}.lora_{ab}.memlong.weight" for i in (2, 3)
             for n in ("q_proj", "k_proj", "v_proj", "o_proj") for ab in "AB"}
    | {f"backbone.model.layers.{i}.{n}.weight" for i in (2, 3) for n in ("input_layernorm", "post_attention_layernorm")}
    | {"backbone.model.norm.weight"},
    "gates_only": {"gates.1", "gates.2", "gates.3"},
    "none": {"gates.1", "gates.2", "gates.3"},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["full", "lora", "gates_only", "none"])
def test_what_is_trained_equals_the_written_list(mode: str) -> None:
    fusion = "gated" if mode in ("gates_only", "none") else "joint"
    model = wrap(fusion=fusion, tuning=TuningConfig(mode=mode, lora_rank=2))
    expected = set() if mode == "none" else TRAINED[mode]
    assert set(model.trainable()) == expected | (one_a_head() if fusion == "joint" else set())


def one_a_head() -> set[str]:
    return {f"{name}.{layer}" for name in ("memory_bias", "memory_scale") for layer in wrap().retrieval_layers}


def test_where_nothing_else_is_trained_biases_are() -> None:
    assert set(wrap(tuning=TuningConfig(mode="gates_only")).trainable()) == one_a_head()
    assert not wrap(memory_bias=False).memory_bias and not wrap(memory_scale=False).memory_scale
    assert not wrap(position="sequential").memory_scale and wrap(position="sequential").memory_bias


def test_a_scale_multiplies_scores_in_what_stands_far() -> None:
    """As a layer whose queries are so much longer reads memory; what stands near is read as before."""
    model = wrap(retrieval_layers=[2], memory_near=0).eval()
    memory = memory_for(model)
    before = model(window(), memory=memory).logits
    factor = torch.tensor([0.5, 1.0, 2.0, 3.0])
    model.memory_scale["2"].data.copy_(factor.log())
    scaled = model(window(), memory=memory).logits
    assert (scaled - before).abs().max() > 1e-4
    plain, turn = wrap(retrieval_layers=[2], memory_near=0).eval(), ContextFactory._turning

    def longer(self: ContextFactory) -> Any:
        return lambda layer, query, begin: turn(self)(layer, query, begin) * factor[:, None, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContextFactory, "_turning", longer)
        torch.testing.assert_close(plain(window(), memory=memory).logits, scaled)
    near = wrap(retrieval_layers=[2]).eval()
    assert torch.equal(wrap(retrieval_layers=[2], memory_scale=False).eval()(window(), memory=memory).logits,
                       near(window(), memory=memory).logits)  # fmt: skip


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_memory_weighs_as_the_reference_however_much_there_is(attention: str) -> None:
    """Twice the same memory is worth as much as once; without a reference, twice as much, which log 2 more tells."""
    how: dict[str, Any] = {"retrieval_layers": [2], "memory_near": 0, "attention": attention}
    model, plain = wrap(**how).eval(), wrap(**how, memory_reference=None).eval()
    once = memory_for(model)
    tokens = once.keys.shape[-2]
    twice = Retrieved(
        *(torch.cat([t, t], dim=-2) for t in (once.keys, once.values)), torch.cat([once.mask, once.mask], dim=1),
        *(torch.cat([t, t], dim=1) for t in (once.scores, once.entries, once.positions)),
    )  # fmt: skip
    ragged = Retrieved(twice.keys, twice.values, twice.mask.clone(), twice.scores, twice.entries, twice.positions)
    ragged.mask[0, tokens:] = False  # row 0 has it once, the other row twice
    ragged.full = False
    expected = model(window(), memory=once).logits
    for memory in (twice, ragged):
        torch.testing.assert_close(model(window(), memory=memory).logits, expected, atol=1e-4, rtol=1e-4)
    assert (plain(window(), memory=twice).logits - plain(window(), memory=once).logits).abs().max() > 1e-3
    plain.memory_bias["2"].data.fill_(math.log(4096 / tokens))
    torch.testing.assert_close(plain(window(), memory=once).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_long_window_raises_less_what_it_did_not_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the square of its length; much is held down as ever."""
    how: dict[str, Any] = {"retrieval_layers": [2], "memory_near": 0}
    model, plain = wrap(**how).eval(), wrap(**how, memory_reference=None).eval()
    memory = memory_for(model)
    tokens, length = memory.keys.shape[-2], window().shape[1]
    monkeypatch.setattr(context, "RAISED_UP_TO", length / 8)
    plain.memory_bias["2"].data.fill_(math.log(4096 / 64 / tokens))
    found = model(window(), memory=memory).logits
    torch.testing.assert_close(found, plain(window(), memory=memory).logits, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(context, "RAISED_UP_TO", 0.001)  # so little that nothing is raised
    few = wrap(**how, memory_reference=2).eval()
    held_down = few(window(), memory=memory).logits
    plain.memory_bias["2"].data.zero_()
    torch.testing.assert_close(model(window(), memory=memory).logits, plain(window(), memory=memory).logits)
    memory.asked = True
    assert torch.equal(few(window(), memory=memory).logits, held_down)
    plain.memory_bias["2"].data.fill_(math.log(4096 / tokens))
    expected = plain(window(), memory=memory).logits
    torch.testing.assert_close(model(window(), memory=memory).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_bias_of_minus_infinity_reads_no_memory() -> None:
    model = wrap(retrieval_layers=[2], memory_near=0).eval()
    memory, plain = memory_for(model), model(window()).logits
    assert (model(window(), memory=memory).logits - plain).abs().max() > 1e-4
    model.memory_bias["2"].data.fill_(float("-inf"))
    torch.testing.assert_close(model(window(), memory=memory).logits, plain)
    for read in (memory, None):
        loss = model(window(), labels=window(), memory=read).loss
        assert loss is not None and loss.isfinite() and loss.requires_grad


def test_lora_targets_that_match_nothing_are_told() -> None:
    with pytest.raises(UserError, match=r"lora_targets=\['query'\].*q_proj"):
        wrap(tuning=TuningConfig(mode="lora", lora_targets=["query"]))


def test_frozen_layers_stay_in_evaluation_mode() -> None:
    model = wrap().train()
    layers = model.backbone.model.layers
    assert [layer.training for layer in layers] == [False, False, True, True]
    assert not model.eval().backbone.model.layers[3].training


def test_a_new_model_is_in_training_mode_and_the_backbone_goes_back_in_its_own() -> None:
    """Lightning trains in whatever mode a module is: in evaluation mode nothing drops out or is checkpointed."""
    for mode in (False, True):
        model = MemLong(tiny_llama().train(mode), memory_layer=1)
        assert model.training and [layer.training for layer in model.tuning.layers] == [False, False, True, True]
        assert all(module.training == mode for module in model.unwrap().modules())


def test_casting_keeps_rotary_tables_and_gates_in_float32() -> None:
    model = wrap(fusion="gated").to(torch.bfloat16)
    rotary = model.backbone.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, tiny_llama().model.rotary_emb.inv_freq)
    assert all(gate.dtype == torch.float32 for gate in model.gates.values())
    assert model.backbone.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(window(), window(), memory=memory_for(model)).loss)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory_layer": 4}, ["model.memory_layer=4", "0..3", "4 layers"]),
        ({"retrieval_layers": [0, 2]}, ["model.retrieval_layers=[0, 2]", "model.memory_layer=1"]),
        ({"retrieval_layers": [2, 9]}, ["model.retrieval_layers=[2, 9]", "0..3"]),
        ({"source": "both"}, ["model.source='both'", "single, per_layer"]),
        ({"fusion": "sum"}, ["model.fusion='sum'", "joint, gated"]),
        ({"memory_distance": 0}, ["model.memory_distance=0", "1 or more"]),
        ({"position": "last"}, ["model.position='last'", "fixed, sequential, zero"]),
    ],
)
def test_bad_settings_are_told(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        wrap(**settings)
    assert all(word in str(error.value) for word in words)


def test_memory_of_another_model_is_refused() -> None:
    model = wrap(source="per_layer")
    with pytest.raises(UserError, match="1 layers, the model stores 3"):
        model(window(), memory=memory_for(wrap(source="single")))
