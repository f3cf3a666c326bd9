"""Half precision through Lightning's own plugins, at late positions, where a cast rotary table ruins everything."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from torch import Tensor

from lightning_memlong.bank import Retrieved
from lightning_memlong.memlong import MemLong
from tests.conftest import tiny_llama

TOKENS, LATE, MEMORY = 8192, 8000, 64
BOUND = 0.03
"""Mean difference of a late token's loss [nats], the losses themselves being about 5; see benchmarks/README.md for the
real model."""


def model() -> MemLong:
    backbone = tiny_llama(max_position_embeddings=2 * TOKENS, head_dim=32, hidden_size=64, initializer_range=0.15)
    wrapped = MemLong(backbone, memory_layer=1, fusion="gated", position="sequential")
    for gate in wrapped.gates.values():
        gate.data.fill_(0.37)
    return wrapped.eval()


def losses(wrapped: MemLong, context: AbstractContextManager) -> Tensor:
    """Of each token of a window of 8,192, memory present."""
    mixer = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (1, TOKENS), generator=mixer)
    shape = (len(wrapped.retrieval_layers), 1, 2, MEMORY, 32)
    keys, values = (torch.randn(*shape, generator=mixer) for _ in range(2))
    nothing = torch.zeros(1, 1)
    memory = Retrieved(keys, values, torch.ones(1, MEMORY, dtype=torch.bool), nothing, nothing, nothing)
    with torch.no_grad(), context:
        output = wrapped(ids, memory=memory)
        assert all(mass.dtype == torch.float32 for mass in output.attention_mass.values())
        return wrapped.head.loss(output.hidden, ids, reduction="none")[0]


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """In float32."""
    return losses(model(), nullcontext())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_late_tokens_are_scored_as_in_float32(precision: str, exact: Tensor) -> None:
    plugin = MixedPrecision("bf16-mixed", "cpu") if precision == "bf16-mixed" else HalfPrecision("bf16-true")  # type: ignore
    half = plugin.convert_module(model())
    assert all(gate.dtype == torch.float32 for gate in half.gates.values())
    found = losses(half, plugin.forward_context())
    assert found.dtype == torch.float32
    late, early = ((found - exact).abs()[part].mean() for part in (slice(LATE, None), slice(1, 193)))
    assert late < BOUND and late < 2 * early, "late positions are no worse than early ones"
    table = half.rotary.module.inv_freq
    assert table.dtype == torch.float32


def test_the_trap_is_real_and_this_test_would_see_it(exact: Tensor) -> None:
    trapped = model()
    table = trapped.rotary.module.inv_freq
    trapped.rotary.module.inv_freq = table.bfloat16().float()  # what .to(bfloat16) does to a plain model
    assert (losses(trapped, nullcontext()) - exact).abs()[LATE:].mean() > 3 * BOUND


def test_a_backbone_that_was_cast_before_it_came_is_put_right() -> None:
    wrapped = MemLong(tiny_llama().to(torch.bfloat16), memory_layer=1)
    assert torch.equal(wrapped.rotary.module.inv_freq, tiny_llama().model.rotary_emb.inv_freq)
    wrapped.rotary.module.inv_freq = wrapped.rotary.module.inv_freq.bfloat16()  # as sharding with mixed precision does
    wrapped(torch.arange(4)[None])
    assert torch.equal(wrapped.rotary.module.inv_freq, tiny_llama().model.rotary_emb.inv_freq)
