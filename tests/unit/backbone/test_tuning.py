"""What is trained, how it is told, and how adapters are merged."""

import pytest
import torch
from torch import Tensor

from lightning_memlong.backbone.tuning import describe, spans
from lightning_memlong.cli.console import show_parameters
from lightning_memlong.config import TuningConfig
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong
from tests.conftest import tiny_llama


def wrap(tuning: TuningConfig, **changes: object) -> MemLong:
    return MemLong(tiny_llama(**changes), memory_layer=1, tuning=tuning)


def stirred(model: MemLong) -> MemLong:
    """Every trained parameter moved by chance, as training would."""
    mixer = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=mixer)
    return model.eval()


def window() -> Tensor:
    return torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(3))


def test_runs_of_layers() -> None:
    assert spans([3, 1, 2, 7, 9, 10]) == "1-3,7,9-10" and spans([]) == ""


def test_parameters_are_told_by_layers(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrap(TuningConfig(mode="lora", lora_rank=2, norms=False))
    rows = describe(model.trainable())
    assert ("backbone.model.layers.2-3.self_attn.q_proj.lora_A.memlong.weight", "2 x 32", 2 * 2 * 32) in rows
    assert ("memory_bias.1-3", "4", 3 * 4) in rows
    assert sum(count for _, _, count in rows) == sum(p.numel() for p in model.trainable().values())
    show_parameters(model)
    told = capsys.readouterr().out
    assert "Memory layer 1" in told and "layers 1-3, each its own" in told and "layers.2-3.self_attn.v_proj" in told
    show_parameters(wrap(TuningConfig(mode="none")))
    assert "Trained: nothing." in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_tuned_apart_from_the_embeddings(mode: str, tied: bool) -> None:
    backbone = tiny_llama(tie_word_embeddings=tied)
    plain = backbone(window()).logits
    model = MemLong(backbone, memory_layer=1, tuning=TuningConfig(mode=mode, lora_rank=2, head=True))  # type: ignore
    assert "backbone.lm_head.weight" in model.trainable()
    assert "backbone.model.embed_tokens.weight" not in model.trainable()
    embeddings, stored = backbone.model.embed_tokens.weight.clone(), model.eval()(window()).keys
    model.train()(window(), window()).loss.backward()
    assert backbone.lm_head.weight.grad.abs().max() > 0
    stirred(model)
    assert torch.equal(backbone.model.embed_tokens.weight, embeddings)
    assert torch.equal(model(window()).keys[0], stored[0]), "what the memory layer stores does not go stale"
    back = model.unwrap()
    assert back.config.tie_word_embeddings == tied and (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    if tied and mode == "lora":
        for norm in (m for m in back.modules() if "norm" in type(m).__name__.lower()):
            norm.weight.data.fill_(1.0)  # stirred as well
        torch.testing.assert_close(back(window()).logits, plain)


def test_adapters_are_merged_beside_the_model() -> None:
    model = stirred(wrap(TuningConfig(mode="lora", lora_rank=2, lora_alpha=3.0)))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    merged = model.tuning.merged_weights()
    plain = tiny_llama(seed=1)
    assert set(merged) == set(plain.state_dict())
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(window()).logits, model(window()).logits, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in before.items()), "the model is not touched"
    assert (model.unwrap()(window()).logits - plain(window()).logits).abs().max() > 1e-3, "adapters do something"


def test_a_target_that_matches_nothing_is_told_even_beside_one_that_does() -> None:
    with pytest.raises(UserError, match=r"qkv_proj matches no linear layer.*Allowed: down_proj.*q_proj"):
        wrap(TuningConfig(mode="lora", lora_targets=["o_proj", "qkv_proj"]))


def test_nothing_is_kept_for_the_backward_pass_of_frozen_layers() -> None:
    """Saved tensors are counted while the graph is alive: as many whether one layer below is frozen or six."""

    def saved(layers: int) -> int:
        model = MemLong(tiny_llama(num_hidden_layers=layers), memory_layer=layers - 2).train()
        assert all(not p.requires_grad for layer in model.tuning.layers[:-1] for p in layer.parameters())
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(window(), window()).loss
        assert loss.requires_grad
        optimizer = torch.optim.AdamW(model.trainable().values())
        loss.backward()
        optimizer.step()
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert all(p.grad is None for p in frozen) and len(optimizer.state) == len(model.trainable())
        return size

    assert saved(2) == saved(7) > 0
