"""The memory part of attention: a query of its own, a bias a head, and tokens that choose what they read."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong.attention import Choice, choice, kernels, retrieval_causal_attention
from lightning_memlong.attention.functional import choose_kernel
from lightning_memlong.attention.inputs import Scores
from lightning_memlong.errors import UserError
from tests.reference import attention_oracle

ROWS, HEADS, KV_HEADS, TOKENS, CHUNKS, SIZE = 2, 4, 2, 6, 4, 8
CHUNK = 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries, the last one ragged."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(choice, "BLOCK", 4)


def inputs(groups: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """What attention takes, a mask (a short chunk, a missing one), a query for memory, a bias."""
    mixer = torch.Generator().manual_seed(groups)
    local = [torch.randn(ROWS, h, TOKENS, SIZE, generator=mixer) for h in (HEADS, KV_HEADS, KV_HEADS)]
    memory = [torch.randn(ROWS * groups, KV_HEADS, CHUNKS * CHUNK, SIZE, generator=mixer) for _ in range(2)]
    mask = torch.ones(ROWS * groups, CHUNKS * CHUNK, dtype=torch.bool)
    mask[0, :CHUNK] = mask[-1, 4] = False
    query = torch.randn(ROWS, HEADS, TOKENS, SIZE, generator=mixer)
    return [*local, *memory], mask, query, torch.tensor([0.0, 1.5, -2.0, -math.inf])


WAYS: list[dict[str, Any]] = [
    {"backend": "auto"}, {"backend": "sdpa"}, {"backend": "auto", "softcap": 3.0}, {"backend": "flex"},
]  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_query_of_its_own_and_a_bias_equal_the_oracle(way: dict[str, Any], groups: int) -> None:
    tensors, mask, query, bias = inputs(groups)
    for q, b in ((query, bias), (query, None), (None, bias)):
        output = retrieval_causal_attention(*tensors, memory_mask=mask, memory_query=q, memory_bias=b, **way)
        expected = attention_oracle(*tensors, mask, "joint", softcap=way.get("softcap"), memory_query=q, memory_bias=b)
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]], ids=str)
def test_tokens_that_choose_equal_the_oracle(way: dict[str, Any], top_k: int) -> None:
    tensors, mask, query, bias = inputs(1)
    output = retrieval_causal_attention(
        *tensors, memory_mask=mask, memory_query=query, memory_bias=bias, choice=Choice(CHUNK, top_k), **way
    )
    # The oracle sums plain exponentials, so it chooses by capped scores as the kernels do.
    expected = attention_oracle(
        *tensors, mask, "joint", softcap=way.get("softcap"), memory_query=query, memory_bias=bias, choice=(CHUNK, top_k)
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chosen", [None, Choice(CHUNK, 2)])
def test_gradients_of_the_two_parts_are_those_of_plain_operations(chosen: Choice | None) -> None:
    tensors, mask, query, bias = inputs(2)
    bias = bias.clamp(min=-5.0)
    grads = []
    for softcap in (None, 1e6):  # a cap this high changes nothing, and takes plain operations
        leaves = [t.clone().requires_grad_() for t in (*tensors[:3], query, bias)]
        output = retrieval_causal_attention(
            *leaves[:3], *tensors[3:], memory_mask=mask, memory_query=leaves[3], memory_bias=leaves[4], choice=chosen,
            softcap=softcap,
        )  # fmt: skip
        grads.append(torch.autograd.grad((output * torch.arange(SIZE)).sum(), leaves))
    for fused, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-3)


def test_as_many_chunks_as_there_are_is_reading_all() -> None:
    tensors, mask, query, _ = inputs(1)
    every = retrieval_causal_attention(*tensors, memory_mask=mask, memory_query=query)
    chosen = retrieval_causal_attention(*tensors, memory_mask=mask, memory_query=query, choice=Choice(CHUNK, CHUNKS))
    torch.testing.assert_close(chosen, every)


@pytest.mark.parametrize(("backend", "dropout"), [("sdpa", 0.0), ("flex", 0.0), ("auto", 0.1)])
def test_kernels_that_cannot_choose_say_so(backend: str, dropout: float) -> None:
    with pytest.raises(UserError, match="memory.candidates"):
        choose_kernel(backend, torch.zeros(1, 1, 1, 8), 1, Scores(1.0, dropout=dropout), chosen=True)
