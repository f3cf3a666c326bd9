"""The memory part of attention: a query of its own, a bias a head, and tokens that choose what they read."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong.attention import (
    Choice,
    attend_with_memory,
    choice,
    functional,
    kernels,
    retrieval_causal_attention,
)
from lightning_memlong.attention.cuda_kernel import CUDA_KERNEL
from lightning_memlong.attention.functional import FUSED, choose_kernel
from lightning_memlong.attention.inputs import RetrievedKV, Scores
from lightning_memlong.errors import UserError
from tests.cuda_kernels import patched
from tests.reference import WAYS, attention_oracle

ROWS, HEADS, KV_HEADS, TOKENS, CHUNKS, SIZE = 2, 4, 2, 6, 4, 8
CHUNK = 3


@pytest.fixture(params=["cpu", "cuda"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fused kernels in two parts; CUDA's in plain operations, at the CPU's place."""
    if request.param == "cuda":
        patched(monkeypatch)
        monkeypatch.setitem(FUSED, "cpu_two_part", CUDA_KERNEL)
    return str(request.param)


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


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_query_of_its_own_and_a_bias_equal_the_oracle(way: dict[str, Any], groups: int) -> None:
    tensors, mask, query, bias = inputs(groups)
    of_rows = bias + torch.arange(ROWS * groups)[:, None]
    for q, b in ((query, bias), (query, None), (None, bias), (query, of_rows)):
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


@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize("chosen", [None, Choice(CHUNK, 2)])
def test_gradients_of_the_two_parts_are_those_of_plain_operations(
    chosen: Choice | None, of_rows: bool, fused: str
) -> None:
    if chosen and fused == "cuda":
        pytest.skip("choosing takes plain operations there")
    tensors, mask, query, bias = inputs(2)
    bias = bias.clamp(min=-5.0)
    bias = bias + torch.arange(ROWS * 2)[:, None] if of_rows else bias
    grads = []
    for softcap in (None, 1e6):  # a cap this high changes nothing, and takes plain operations
        leaves = [t.clone().requires_grad_() for t in (*tensors[:3], query, bias)]
        output = retrieval_causal_attention(
            *leaves[:3], *tensors[3:], memory_mask=mask, memory_query=leaves[3], memory_bias=leaves[4], choice=chosen,
            softcap=softcap,
        )  # fmt: skip
        grads.append(torch.autograd.grad((output * torch.arange(SIZE)).sum(), leaves))
    for fast, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-3)


def near(groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask of memory right before the window; one row has none, another neither near nor far."""
    mixer = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(ROWS * groups, KV_HEADS, 2 * CHUNK, SIZE, generator=mixer) for _ in range(2))
    mask = torch.ones(ROWS * groups, 2 * CHUNK, dtype=torch.bool)
    mask[0], mask[-1, :CHUNK] = False, False
    return keys, values, mask


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("far", [True, False], ids=["far", "none far"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_near_is_read_as_the_window_is(way: dict[str, Any], far: bool, groups: int) -> None:
    tensors, mask, query, bias = inputs(groups)
    beside = near(groups)
    if not far:
        mask[0] = False  # with nothing near either
    memory = RetrievedKV(*tensors[3:], mask, query=query, bias=bias, near=RetrievedKV(*beside))
    scores = Scores(SIZE**-0.5, way.get("softcap"))
    output, mass = attend_with_memory(*tensors[:3], memory, None, scores, way["backend"])
    expected = attention_oracle(
        *tensors, mask, "joint", softcap=way.get("softcap"), memory_query=query, memory_bias=bias, near=beside
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)
    assert mass is None or (bool(((mass >= 0) & (mass <= 1)).all()) and far == bool((mass[0, 0] > 0).all()))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gates_weigh_near_and_far_together(way: dict[str, Any], groups: int) -> None:
    tensors, mask, query, _ = inputs(groups)
    beside, gate = near(groups), torch.tensor([0.0, 0.5, -1.0, 2.0])
    memory = RetrievedKV(*tensors[3:], mask, gate=gate, query=query, near=RetrievedKV(*beside))
    scores = Scores(SIZE**-0.5, way.get("softcap"))
    output, _ = attend_with_memory(*tensors[:3], memory, None, scores, way["backend"])
    expected = attention_oracle(
        *tensors, mask, "gated", gate, softcap=way.get("softcap"), memory_query=query, near=beside
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("fused")
def test_gradients_with_near_memory_are_those_of_plain_operations() -> None:
    tensors, mask, query, bias = inputs(2)
    bias = bias.clamp(min=-5.0)
    grads = []
    for softcap in (None, 1e6):
        leaves = [t.clone().requires_grad_() for t in (*tensors[:3], query, bias)]
        memory = RetrievedKV(*tensors[3:], mask, query=leaves[3], bias=leaves[4], near=RetrievedKV(*near(2)))
        output, _ = attend_with_memory(*leaves[:3], memory, None, Scores(SIZE**-0.5, softcap))
        grads.append(torch.autograd.grad((output * torch.arange(SIZE)).sum(), leaves))
    for fast, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-3)


def test_as_many_chunks_as_there_are_is_reading_all() -> None:
    tensors, mask, query, _ = inputs(1)
    every = retrieval_causal_attention(*tensors, memory_mask=mask, memory_query=query)
    chosen = retrieval_causal_attention(*tensors, memory_mask=mask, memory_query=query, choice=Choice(CHUNK, CHUNKS))
    torch.testing.assert_close(chosen, every)


@pytest.mark.parametrize(("backend", "dropout"), [("sdpa", 0.0), ("flex", 0.0), ("auto", 0.1)])
def test_kernels_that_cannot_choose_say_so(backend: str, dropout: float) -> None:
    with pytest.raises(UserError, match="memory.candidates"):
        choose_kernel(backend, torch.zeros(1, 1, 1, 8), 1, Scores(1.0, dropout=dropout), chosen=True)


def test_two_parts_choose_on_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    query, scores = torch.zeros(1, 1, 1, 8), Scores(1.0)
    assert choose_kernel("two_part", query, 1, scores, chosen=True) == "cpu_two_part"
    monkeypatch.setattr(functional, "can_use_cpu_kernel", lambda *_: False)
    monkeypatch.setattr(functional, "can_use_cuda_kernel", lambda *_: True)
    assert choose_kernel("two_part", query, 1, scores) == "cuda_two_part"
    with pytest.raises(UserError, match="with memory.candidates.*choose auto"):
        choose_kernel("two_part", query, 1, scores, chosen=True)
