"""The share of attention each chunk gets, against the oracle reading values that say which chunk they are of."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong.attention import Choice, Readers, attend_with_memory, chunk_shares, use
from lightning_memlong.attention.inputs import RetrievedKV, Scores
from tests.reference import WAYS, attention_oracle

ROWS, HEADS, KV_HEADS, TOKENS, CHUNKS, SIZE = 2, 4, 2, 6, 4, 8
CHUNK = 3
BIAS = torch.tensor([0.0, 1.5, -2.0, -math.inf])


@pytest.fixture(autouse=True)
def every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is all tokens, as the oracle has it."""
    monkeypatch.setattr(use, "EVERY", 1)


def tensors(groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, what memory is read with, and its keys."""
    mixer = torch.Generator().manual_seed(groups)
    query, asking = (torch.randn(ROWS, HEADS, TOKENS, SIZE, generator=mixer) for _ in range(2))
    key = torch.randn(ROWS, KV_HEADS, TOKENS, SIZE, generator=mixer)
    return query, key, asking, torch.randn(ROWS * groups, KV_HEADS, CHUNKS * CHUNK, SIZE, generator=mixer)


def whose(rows: int, first: int, count: int) -> Tensor:
    """Values (rows, H_kv, count * C, D), one-hot in the number of the chunk."""
    chunk = first + torch.arange(count).repeat_interleave(CHUNK)
    return torch.nn.functional.one_hot(chunk, SIZE).float().expand(rows, KV_HEADS, -1, -1)


def padding(rows: int) -> Tensor:
    """A chunk that is missing, and one that is short."""
    mask = torch.ones(rows, CHUNKS * CHUNK, dtype=torch.bool)
    mask[0, :CHUNK] = mask[-1, 4] = False
    return mask


def share_of_chunks(output: Tensor, groups: int) -> Tensor:
    """(R, k), what the oracle's output (B, H, T, D) says of each chunk, mean over tokens and heads."""
    return output.unflatten(2, (groups, -1)).mean((1, 3)).flatten(0, 1)[:, :CHUNKS]


def told(
    query: Tensor, key: Tensor, memory: RetrievedKV, scores: Scores, backend: str, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Shares of chunks after the kernel of a backend, and the mass it told."""
    local_value = torch.zeros_like(key)
    mass = attend_with_memory(query, key, local_value, memory, None, scores, backend)[1]
    return chunk_shares(query, key, memory, mass, None, scores, Readers(CHUNK, CHUNKS, lengths)).mean((1, 2)), mass


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_shares_equal_the_oracle(way: dict[str, Any], groups: int) -> None:
    query, key, asking, memory_key = tensors(groups)
    mask, values = padding(ROWS * groups), whose(ROWS * groups, 0, CHUNKS)
    for q, b in ((None, None), (asking, None), (asking, BIAS)):
        memory = RetrievedKV(memory_key, values, mask, query=q, bias=b)
        found, mass = told(query, key, memory, Scores(SIZE**-0.5, way.get("softcap")), way["backend"])
        expected = attention_oracle(
            query, key, torch.zeros_like(key), memory_key, values, mask, "joint", softcap=way.get("softcap"),
            memory_query=q, memory_bias=b,
        )  # fmt: skip
        torch.testing.assert_close(found.double(), share_of_chunks(expected, groups), atol=1e-5, rtol=1e-4)
        assert (mass is None) == (way["backend"] == "sdpa") and found[0, 0] == 0, "a missing chunk gets nothing"


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_near_chunks_are_the_last_of_the_record(way: dict[str, Any], mixed: bool) -> None:
    query, key, asking, memory_key = tensors(1)
    mask, values, count = padding(ROWS), whose(ROWS, 0, CHUNKS), 2
    beside = memory_key[:, :, -count * CHUNK :].flip(1)
    near_mask = mask[:, -count * CHUNK :].clone()
    if mixed:  # the first row has one near chunk less, which is far
        near_mask[0, :CHUNK] = False
        mask[:, -count * CHUNK :] &= ~near_mask
    else:
        memory_key, values, mask = (t[..., : -count * CHUNK, :] for t in (memory_key, values, mask[..., None]))
        mask = mask[..., 0]
    near = (beside, whose(ROWS, CHUNKS - count, count), near_mask)
    memory = RetrievedKV(memory_key, values, mask, query=asking, bias=BIAS, near=RetrievedKV(*near))
    found, _ = told(query, key, memory, Scores(SIZE**-0.5, way.get("softcap")), way["backend"])
    expected = attention_oracle(
        query, key, torch.zeros_like(key), memory_key, values, mask, "joint", softcap=way.get("softcap"),
        memory_query=asking, memory_bias=BIAS, near=near,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), share_of_chunks(expected, 1), atol=1e-5, rtol=1e-4)
    assert (found[0, 1:] > 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]], ids=str)
def test_what_a_token_does_not_choose_gets_nothing_of_it(way: dict[str, Any], top_k: int) -> None:
    query, key, asking, memory_key = tensors(1)
    mask, values = padding(ROWS), whose(ROWS, 0, CHUNKS)
    memory = RetrievedKV(memory_key, values, mask, query=asking, bias=BIAS, choice=Choice(CHUNK, top_k))
    found, _ = told(query, key, memory, Scores(SIZE**-0.5, way.get("softcap")), way["backend"])
    expected = attention_oracle(
        query, key, torch.zeros_like(key), memory_key, values, mask, "joint", softcap=way.get("softcap"),
        memory_query=asking, memory_bias=BIAS, choice=(CHUNK, top_k),
    )  # fmt: skip
    torch.testing.assert_close(found.double(), share_of_chunks(expected, 1), atol=1e-5, rtol=1e-4)


def test_gates_weigh_what_is_read() -> None:
    query, key, _, memory_key = tensors(2)
    mask, values, gate = padding(2 * ROWS), whose(2 * ROWS, 0, CHUNKS), torch.tensor([0.0, 0.5, -1.0, 2.0])
    found, _ = told(query, key, RetrievedKV(memory_key, values, mask, gate=gate), Scores(SIZE**-0.5), "auto")
    expected = attention_oracle(query, key, torch.zeros_like(key), memory_key, values, mask, "gated", gate=gate.abs())
    torch.testing.assert_close(found.double(), share_of_chunks(expected, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("additive", [False, True])
def test_a_prefix_and_a_local_mask(additive: bool) -> None:
    """A token before the window reads nothing; the local mask hides one token from all others."""
    query, key, asking, memory_key = tensors(1)
    mask, values = padding(ROWS), whose(ROWS, 0, CHUNKS)
    local = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    local[3:, 2] = False
    given = torch.zeros(local.shape).masked_fill(~local, -math.inf) if additive else local
    memory = RetrievedKV(memory_key, values, mask, prefix=1, query=asking[:, :, 1:])
    expected = attention_oracle(
        query, key, torch.zeros_like(key), memory_key, values, mask, "joint", memory_query=asking, local_mask=local
    )
    for backend in ("auto", "sdpa"):
        scores = Scores(SIZE**-0.5)
        args = (memory, given[None, None], scores)
        mass = attend_with_memory(query, key, torch.zeros_like(key), *args, backend)[1]
        found = chunk_shares(query, key, memory, mass, *args[1:], Readers(CHUNK, CHUNKS)).mean((1, 2))
        torch.testing.assert_close(found.double(), share_of_chunks(expected[:, :, 1:], 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_tokens_after_a_cache_see_all_of_it(backend: str) -> None:
    """The newest token alone attends as it does among all."""
    query, key, _, memory_key = tensors(1)
    mask, values = padding(ROWS), whose(ROWS, 0, CHUNKS)
    memory = RetrievedKV(memory_key, values, mask)
    found, _ = told(query[:, :, -1:], key, memory, Scores(SIZE**-0.5), backend)
    expected = attention_oracle(query, key, torch.zeros_like(key), memory_key, values, mask, "joint")
    torch.testing.assert_close(found.double(), share_of_chunks(expected[:, :, -1:], 1), atol=1e-5, rtol=1e-4)


def test_padding_has_no_say() -> None:
    query, key, _, memory_key = tensors(2)
    mask, values = padding(2 * ROWS), whose(2 * ROWS, 0, CHUNKS)
    mask[3] = False
    lengths = torch.tensor([3, 4])  # one group of padding; one with a token, and nothing retrieved
    query[0, :, 3:], query[1, :, 4:] = 100.0, 100.0
    found, _ = told(query, key, RetrievedKV(memory_key, values, mask), Scores(SIZE**-0.5), "auto", lengths)
    whole = attention_oracle(query, key, torch.zeros_like(key), memory_key, values, mask, "joint")
    expected = share_of_chunks(whole, 2)
    torch.testing.assert_close(found[[0, 2]].double(), expected[[0, 2]], atol=1e-5, rtol=1e-4)
    assert not found[1].any() and not found[3].any()


def test_the_sample_is_even_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "EVERY", 32)
    cpu = torch.device("cpu")
    places, there = Readers(128, 3).sample(1, 512, 1, cpu)
    assert places.tolist() == [list(range(16, 512, 32))] and there.tolist() == [True]
    for tokens, groups, count in ((1, 1, 1), (512, 4, 16), (8192, 1, 64), (8192, 64, 64), (4096, 128, 128)):
        places, _ = Readers(1, 1).sample(1, tokens, groups, cpu)
        assert places.shape == (1, count)
        assert torch.equal(places.view(groups, -1) // (tokens // groups), torch.arange(groups)[:, None].expand(
            -1, count // groups)), "each group has its own"  # fmt: skip
    places, there = Readers(1, 1, torch.tensor([100, 512])).sample(2, 512, 2, cpu)
    assert places[0, :8].max() < 100 and there.tolist() == [True, False, True, True]
