"""Attention in two parts with all it may be given, against plain operations in float32 on the CPU."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_memlong.attention import RetrievedKV, Scores, attend_with_memory
from tests.gpu.conftest import error
from tests.gpu.kernels import GOALS

ROWS, HEADS, TOKENS, MEMORY, NEAR = 2, 4, 26, 24, 16
CASES = list(itertools.product((4, 2), (32, 100), (0, 2), (False, True)))
"""Key heads, head size, tokens that read no memory, whether there are masks."""


def inputs(kv_heads: int, size: int, prefix: int) -> list[Tensor]:
    """Query, key, value; memory's keys, values and query; those near; a bias."""
    mixer = torch.Generator().manual_seed(size + kv_heads)
    shapes = [(HEADS, TOKENS), (kv_heads, TOKENS), (kv_heads, TOKENS), (kv_heads, MEMORY), (kv_heads, MEMORY),
              (HEADS, TOKENS - prefix), (kv_heads, NEAR), (kv_heads, NEAR)]  # fmt: skip
    return [torch.randn(ROWS, *shape, size, generator=mixer) for shape in shapes]


def masks() -> tuple[Tensor, Tensor, Tensor]:
    """Of memory, one row of which has nothing; of what is near; of the window, which slides."""
    far, near = torch.ones(ROWS, MEMORY, dtype=torch.bool), torch.ones(ROWS, NEAR, dtype=torch.bool)
    far[0, 5:9], far[1], near[0, :4] = False, False, False
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return far, near, ((distance >= 0) & (distance < 9))[None, None]


def attend(tensors: list[Tensor], prefix: int, masked: bool, backend: str, softcap: float | None) -> Tensor:
    """Output with gradients of the first three tensors, of memory's query and of the bias."""
    query, key, value, far_keys, far_values, reading, near_keys, near_values, bias = tensors
    far_mask, near_mask, local = (m.to(query.device) if masked else None for m in masks())
    near = RetrievedKV(near_keys, near_values, near_mask)
    memory = RetrievedKV(far_keys, far_values, far_mask, prefix, None, reading, bias, None, near)
    scores = Scores(query.shape[-1] ** -0.5, softcap)
    return attend_with_memory(query, key, value, memory, local, scores, backend)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kv_heads", "size", "prefix", "masked"), CASES)
def test_all_it_may_be_given(
    kv_heads: int, size: int, prefix: int, masked: bool, dtype: torch.dtype, device: torch.device,
    measured: Callable[[str, float, float], None],
) -> None:  # fmt: skip
    rounded = [t.to(dtype) for t in inputs(kv_heads, size, prefix)]
    bias = torch.tensor([0.5, -1.0, -math.inf, 2.0])
    weight = torch.randn(ROWS, HEADS, TOKENS, size, generator=torch.Generator().manual_seed(2))
    outputs, grads = [], []
    for backend, softcap, where in (("auto", 1e6, torch.device("cpu")), ("two_part", None, device)):
        kind = torch.float32 if softcap else dtype
        tensors = [*(t.to(where, kind) for t in rounded), bias.to(where)]
        leaves = [t.requires_grad_() for i, t in enumerate(tensors) if i in (0, 1, 2, 5, 8)]
        output = attend(tensors, prefix, masked, backend, softcap)
        outputs.append(output.detach())
        grads.append(torch.autograd.grad((output.float() * weight.to(where)).sum(), leaves))
    name = f"two parts, {str(dtype).removeprefix('torch.')}: relative error"
    measured(f"{name} of the output", error(outputs[1], outputs[0]), GOALS[dtype])
    for fast, slow in zip(*(g[:-1] for g in grads), strict=True):
        measured(f"{name} of gradients", error(fast, slow), GOALS[dtype])
    told = [g[-1].nan_to_num(0.0) for g in grads]  # of the head that reads nothing plain operations give no number
    measured(f"{name} of the bias's gradient", error(told[1], told[0]), 5 * GOALS[dtype])
