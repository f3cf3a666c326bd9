"""LongCE: weights against numbers by hand, the loss and its gradients against whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank import Retrieved
from lightning_memlong.config import TuningConfig
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong
from lightning_memlong.training.loss_weights import long_context_loss, long_context_weights, plain_loss
from tests.conftest import tiny_llama

TOKENS, MEMORY = 16, 8


def wrap(**settings: object) -> MemLong:
    return MemLong(tiny_llama(), **({"memory_layer": 1} | settings)).train()  # type: ignore[arg-type]


def batch(model: MemLong, mask: Tensor | None = None) -> dict[str, object]:
    """Two rows, of which the second ends early and the first is scored from its fifth token on."""
    mixer = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 97, (2, TOKENS), generator=mixer)
    labels = ids.clone()
    labels[0, :5], labels[1, 12:] = -100, -100
    keys, values = (torch.randn(len(model.retrieval_layers), 2, 2, MEMORY, 8, generator=mixer) for _ in range(2))
    mask = torch.ones(2, MEMORY, dtype=torch.bool) if mask is None else mask
    nothing = torch.zeros(2, 2)
    memory = Retrieved(keys, values, mask, nothing, nothing.long(), nothing.long())
    return {"input_ids": ids, "labels": labels, "memory": memory}


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")


def gradients(model: MemLong, loss: Tensor) -> dict[str, Tensor]:
    trained = model.trainable()
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: grad for name, grad in zip(trained, found, strict=True) if grad is not None}


def test_weights_by_hand() -> None:
    off, on = torch.tensor([2.0, 1.0, 3.0, 9.0]), torch.tensor([2.0, 1.5, 2.0, 1.0])
    expected = torch.tensor([1.0, 0.60653, 2.71828, 5.0])  # e^0, e^-0.5, e^1, and e^8 cut off
    torch.testing.assert_close(long_context_weights(off, on), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_are_those_of_weighted_logits(checkpointed: bool) -> None:
    model = wrap(gradient_checkpointing=checkpointed)
    window = batch(model)
    ids, labels, memory = window["input_ids"], window["labels"], window["memory"]
    scored = long_context_loss(model, window)
    each = losses(model(ids, memory=memory).logits, labels)
    with torch.no_grad():
        off = losses(model(ids).logits, labels)
        weights = (off - each).exp().clamp(max=5)
    real = labels[:, 1:].flatten() != -100
    count = int(real.sum())
    assert count == 11 + 11 and weights[real].max() > 3 and weights[real].min() < 1
    expected = (weights * each)[real].sum() / count
    torch.testing.assert_close(scored.loss, expected)
    torch.testing.assert_close(scored.means["loss"], each[real].mean())
    torch.testing.assert_close(scored.means["loss_weight"], weights[real].mean())
    torch.testing.assert_close(scored.means["loss"], plain_loss(model, window).loss)
    ours, theirs = gradients(model, scored.loss), gradients(model, expected)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_where_nothing_was_retrieved_every_token_counts_the_same() -> None:
    model = wrap()
    window = batch(model)
    empty = batch(model, torch.zeros(2, MEMORY, dtype=torch.bool))
    for nothing in (window | {"memory": None}, empty):
        for sharded in (False, True):
            scored = long_context_loss(model, nothing, sharded)
            assert torch.equal(scored.loss, plain_loss(model, nothing).loss) and scored.means["loss_weight"] == 1
            assert gradients(model, scored.loss)
    with pytest.raises(UserError, match=r"model.loss_weights='long_context'.*memory.enabled"):
        long_context_loss(model, {k: v for k, v in window.items() if k != "memory"})


def test_both_passes_drop_out_the_same_units() -> None:
    """A row without memory then costs the same twice, and weighs 1."""
    model = wrap(tuning=TuningConfig("lora", lora_rank=2, lora_alpha=64, lora_dropout=0.5))
    for name, adapter in model.trainable().items():
        if "lora_B" in name or "up" in name:
            torch.nn.init.normal_(adapter)
    mask = torch.tensor([[True] * MEMORY, [False] * MEMORY])
    window = batch(model, mask)
    torch.manual_seed(5)
    plain, state = plain_loss(model, window), torch.get_rng_state()
    torch.manual_seed(5)
    scored = long_context_loss(model, window)
    torch.testing.assert_close(scored.means["loss"], plain.loss.detach())
    assert torch.equal(torch.get_rng_state(), state), "the pass without memory draws nothing of its own"
    window["labels"][0] = -100  # type: ignore[index]
    torch.testing.assert_close(long_context_loss(model, window).means["loss_weight"], torch.tensor(1.0))


def test_autocast_keeps_the_gradients() -> None:
    model = wrap()
    window = batch(model)
    found = []
    for cached in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            found.append(gradients(model, long_context_loss(model, window).loss))
    assert found[0].keys() == found[1].keys() and sum("proj" in name for name in found[0]) == 14
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=0.02, rtol=0.05, msg=name)
