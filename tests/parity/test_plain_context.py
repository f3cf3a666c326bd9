"""A text read without memory, piece by piece, against the backbone alone and against itself in one go."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong.generation import PlainContext, Sliding
from lightning_memlong.memlong import MemLong
from tests.conftest import tiny_llama

SLIDING = Sliding(sinks=4, window=32, stride=16)


def ids_of(count: int) -> Tensor:
    return torch.randint(3, 61, (1, count), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[None, 1])
def model(request: Any) -> MemLong:
    return MemLong(tiny_llama(), memory_layer=1, bos=request.param).eval()


@torch.no_grad()
def test_a_text_read_in_pieces_has_the_backbones_logits(model: MemLong) -> None:
    ids = ids_of(60)
    fed = ids if model.bos is None else torch.cat([torch.full((1, 1), model.bos), ids], dim=1)
    wanted = model.backbone(fed).logits[:, -60:]
    context = PlainContext(model, nullcontext)
    found = [context.logits(ids[:, :end], last) for end, last in ((33, 33), (34, 1), (50, 16))]
    fork = context.fork()
    torch.testing.assert_close(torch.cat(found, dim=1), wanted[:, :50], rtol=1e-4, atol=1e-4)
    for going_on in (fork, context, fork.fork()):  # one does not disturb the others
        if going_on.length < 55:
            torch.testing.assert_close(going_on.logits(ids[:, :58], 3), wanted[:, 55:58], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fork.logits(ids), wanted[:, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_sliding_window_is_the_same_in_one_go_and_stride_by_stride(model: MemLong) -> None:
    first = SLIDING.sinks + SLIDING.window - int(model.bos is not None)
    ids = ids_of(first + 3 * SLIDING.stride)
    whole = PlainContext(model, nullcontext, SLIDING).read(ids, 20)
    assert whole.shape[1] == 20
    steps = PlainContext(model, nullcontext, SLIDING)
    ends = range(first, ids.shape[1] + 1, SLIDING.stride)
    logits = [steps.logits(ids[:, :end], SLIDING.stride) for end in ends]
    joined = torch.cat(logits, dim=1)[:, -20:]
    torch.testing.assert_close(joined, model.head.logits(whole), rtol=1e-4, atol=1e-4)
    long = PlainContext(model, nullcontext, SLIDING).read(ids, 200)
    assert long.shape[1] == ids.shape[1] + int(model.bos is not None) and torch.equal(long[:, -20:], whole)
    fork = steps.fork()
    more = torch.cat([ids, ids_of(2)], dim=1)
    assert torch.equal(fork.logits(more, 2), steps.logits(more, 2))
    dense = model.backbone(ids).logits[:, -20:]
    assert not torch.allclose(joined, dense, atol=1e-2), "far tokens are gone"
