"""Losses made a block at a time equal those of whole logits, gradients included, whatever a family does to logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.backbone import lm_head as head_module
from lightning_memlong.backbone.lm_head import Head
from tests.conftest import tiny_llama

TOKENS = 21


def head(monkeypatch: pytest.MonkeyPatch, rows_at_once: int = 4, **changes: object) -> Head:
    """Of a tiny model with 97 words; blocks of a few positions, so that there are several and a ragged last one."""
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", rows_at_once * 97 + 5)
    backbone = tiny_llama()
    for name, value in changes.items():
        setattr(backbone.config, name, value)
    return Head(backbone)


def inputs() -> tuple[Tensor, Tensor]:
    mixer = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, TOKENS, 32, generator=mixer)
    labels = torch.randint(0, 97, (2, TOKENS), generator=mixer)
    labels[0, 3:9] = -100
    return hidden, labels


def whole(hidden: Tensor, weight: Tensor, labels: Tensor, divisor: float, softcap: float | None) -> Tensor:
    logits = hidden[:, :-1] @ weight.T / divisor
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize(("divisor", "softcap"), [(1.0, None), (2.5, None), (1.0, 3.0)])
@pytest.mark.parametrize("trained", [False, True])
def test_loss_and_gradients_equal_those_of_whole_logits(
    divisor: float, softcap: float | None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = head(monkeypatch, logits_scaling=divisor, final_logit_softcapping=softcap)
    weight = ours.linear.weight.requires_grad_(trained)
    results = []
    for function in (ours.loss, lambda h, y: whole(h, weight, y, divisor, softcap)):
        hidden, labels = inputs()
        hidden.requires_grad_()
        weight.grad = None
        loss = function(hidden, labels)
        (3 * loss).backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for fast, slow in zip(*results, strict=True):
        assert (fast is None) == (slow is None)
        if fast is not None:
            torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    assert (results[0][2] is not None) == trained and results[0][1].abs().max() > 0


@pytest.mark.parametrize(("divisor", "softcap"), [(1.0, None), (2.5, None), (1.0, 3.0)])
def test_each_token_can_have_a_weight(divisor: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = head(monkeypatch, logits_scaling=divisor, final_logit_softcapping=softcap)
    weight = ours.linear.weight.requires_grad_()
    weights = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(5)) * 3
    hidden, labels = inputs()
    hidden.requires_grad_()
    logits = hidden[:, :-1] @ weight.T / divisor
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    each = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    expected = (each * weights[:, 1:].flatten()).sum() / (2 * (TOKENS - 1) - 6)
    loss = ours.loss(hidden, labels, weights=weights)
    torch.testing.assert_close(loss, expected)
    with torch.no_grad():
        torch.testing.assert_close(ours.loss(hidden, labels, weights=weights), expected)
    pairs = zip(*(torch.autograd.grad(value, (hidden, weight)) for value in (loss, expected)), strict=True)
    for fast, slow in pairs:
        torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)


def test_losses_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = head(monkeypatch)
    hidden, labels = inputs()
    each = ours.loss(hidden, labels, reduction="none")
    assert each.shape == (2, TOKENS) and not each.requires_grad
    assert (each[:, 0] == 0).all() and (each[0, 3:9] == 0).all() and (each[1, 1:] > 0).all()
    torch.testing.assert_close(ours.loss(hidden, labels), each.sum() / (2 * (TOKENS - 1) - 6))
    assert ours.loss(hidden, torch.full_like(labels, -100)) == 0


def test_a_bias_is_part_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = head(monkeypatch)
    ours.linear.bias = torch.nn.Parameter(torch.randn(97))
    hidden, labels = inputs()
    ours.loss(hidden, labels).backward()
    logits = ours.logits(hidden)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(ours.loss(hidden, labels), expected, atol=1e-6, rtol=1e-5)
    (grad,) = torch.autograd.grad(expected, ours.linear.bias)
    torch.testing.assert_close(ours.linear.bias.grad, grad, atol=1e-6, rtol=1e-5)


def test_no_more_logits_exist_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = head(monkeypatch, rows_at_once=4)
    sizes: list[int] = []
    raw = head_module._Blocks._raw
    monkeypatch.setattr(head_module._Blocks, "_raw", lambda self, h: sizes.append(len(h)) or raw(self, h))
    hidden, labels = inputs()
    ours.loss(hidden.requires_grad_(), labels).backward()
    assert max(sizes) == 4 and sum(sizes) == 2 * (TOKENS - 1) - 6, "each position once, the backward pass included"
