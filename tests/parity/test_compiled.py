"""Compiled layers give what others give, in training, reading and writing, and are not compiled again and again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_memlong.errors import UserError
from lightning_memlong.retrieval import retrieve_for
from tests.conftest import tiny_llama
from tests.parity.test_families import build
from tests.parity.test_generation import model_of, text, words

BACKEND = "aot_eager"  # traces forward and backward; only the code it makes is not inductor's


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def step(model: Any, bank: Any, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a window with memory."""
    ids = torch.randint(3, 61, (1, 32), generator=torch.Generator().manual_seed(seed))
    memory = retrieve_for(model.retrieval, bank, [model.retrieval.retriever.encode(["3 4 5"])])
    model.zero_grad()
    loss = model(ids, ids, memory=memory).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


LEARNING = [
    pytest.param(
        family, settings, marks=() if (family, number) in (("Llama", 1), ("Gemma 3 (text)", 2)) else pytest.mark.long
    )
    for family in ("Llama", "Gemma 3 (text)", "Qwen3")
    for number, settings in enumerate([{}, {"gradient_checkpointing": True}, {"fusion": "gated"}])
]
"""Compiling takes most of a minute; each family's and each setting's own shapes are all tried by the long tests."""


@pytest.mark.parametrize("family, settings", LEARNING)
def test_it_learns_the_same(family: str, settings: dict[str, Any]) -> None:
    found = []
    for compiled in (None, BACKEND):
        model = model_of(build(family), compile=compiled, **settings)
        bank = model.read(words(text(98, 2)), window=24, progress=False)
        model.train()
        found.append([step(model, bank, seed) for seed in range(2)])
    for (loss, gradients), (other, others) in zip(*found, strict=True):
        torch.testing.assert_close(loss, other, atol=1e-5, rtol=1e-5)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, others[name], atol=1e-5, rtol=1e-3, msg=name)


def test_it_writes_the_same_and_is_compiled_a_few_times_only() -> None:
    found = []
    for compiled in (None, BACKEND):
        model = model_of(tiny_llama(), compile=compiled)
        bank = model.read(words(text(98, 2)), window=24, progress=False)
        found.append([model.generate(words(text(n, n)), bank, window=32, max_new_tokens=30) for n in (3, 9, 20)])
    assert found[0] == found[1]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.generate(words(text(14, 5)), bank, window=32, max_new_tokens=40)
    assert 0 < graphs < 40 and torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 4
    assert "llama" in str(type(model.unwrap())).lower()
    assert all(layer._compiled_call_impl is None for layer in model.backbone.get_decoder().layers)


def test_an_unknown_backend_is_told() -> None:
    with pytest.raises(UserError, match="model.compile='fast'.*inductor"):
        model_of(tiny_llama(), compile="fast")
