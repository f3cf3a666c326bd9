"""Each attention kernel against the float64 oracle, in float32 and bfloat16, forward and backward."""

import pytest
import torch
from torch import Tensor

from lightning_memlong.attention import retrieval_causal_attention
from lightning_memlong.errors import UserError
from tests.reference import attention_oracle

ROWS, TOKENS, MEMORY, SIZE = 2, 8, 8, 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs_of(heads: int, kv_heads: int, groups: int, size: int = SIZE) -> list[Tensor]:
    mixer = torch.Generator().manual_seed(heads + kv_heads + groups)
    shapes = [(ROWS, heads, TOKENS), (ROWS, kv_heads, TOKENS), (ROWS, kv_heads, TOKENS)]
    shapes += [(ROWS * groups, kv_heads, MEMORY)] * 2
    return [torch.randn(*shape, size, generator=mixer) for shape in shapes]


def mask_of(kind: str, groups: int) -> Tensor:
    mask = torch.ones(ROWS * groups, MEMORY, dtype=torch.bool)
    if kind == "ragged":
        mask[0, 3:] = mask[-1, :1] = False
    if kind == "a row empty":
        mask[-1] = False
    return mask


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error norm; NaN is never small."""
    found = found.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def attend(inputs: list[Tensor], mask: Tensor | None, backend: str, **more: object) -> Tensor:
    try:
        return retrieval_causal_attention(*inputs, memory_mask=mask, backend=backend, **more)  # type: ignore[arg-type]
    except UserError as error:
        pytest.skip(f"refused by name: {error}")


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "kind"),
    [((4, 4), 1, "full"), ((4, 2), 1, "ragged"), ((4, 1), 2, "a row empty"), ((4, 2), 4, "full")],
)
@pytest.mark.parametrize("fusion", ["joint", "gated"])
def test_forward_equals_the_oracle(
    device: torch.device, backend: str, dtype: torch.dtype, heads: tuple[int, int], groups: int, kind: str, fusion: str
) -> None:
    inputs = [t.to(dtype) for t in inputs_of(*heads, groups)]
    mask, gate = mask_of(kind, groups), torch.linspace(-1, 1, heads[0])
    expected = attention_oracle(*inputs, mask, fusion, gate)
    there = None if kind == "full" else mask.to(device)
    with torch.no_grad():
        found = attend([t.to(device) for t in inputs], there, backend, fusion=fusion, gate=gate.to(device))
    assert found.dtype == dtype and distance(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["auto", "flex"])
def test_soft_capped_scores_equal_the_oracle(device: torch.device, backend: str) -> None:
    inputs, mask = inputs_of(4, 2, 1), mask_of("ragged", 1)
    expected = attention_oracle(*inputs, mask, "joint", softcap=0.7)
    with torch.no_grad():
        found = attend([t.to(device) for t in inputs], mask.to(device), backend, softcap=0.7)
    assert distance(found, expected) < TOLERANCE[torch.float32]


def plain_joint(inputs: list[Tensor], mask: Tensor, softcap: float | None = None) -> Tensor:
    """Joint attention in plain float64 operations, one memory a row; differentiable."""
    query, key, value, memory_key, memory_value = inputs
    group = query.shape[1] // key.shape[1]
    keys, values = (torch.cat(pair, 2).repeat_interleave(group, 1) for pair in
                    ((memory_key, key), (memory_value, value)))  # fmt: skip
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(ROWS, TOKENS, TOKENS)
    seen = torch.cat([mask[:, None].expand(ROWS, TOKENS, MEMORY), causal], -1)[:, None]
    scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("size", [16, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_equal_plain_operations(
    device: torch.device, backend: str, dtype: torch.dtype, heads: tuple[int, int], size: int, softcap: float | None
) -> None:
    if softcap is not None and backend == "sdpa":
        backend = "auto"
    inputs, mask = [t.to(dtype) for t in inputs_of(*heads, 1, size)], mask_of("ragged", 1)
    weight = torch.randn(ROWS, heads[0], TOKENS, size, generator=torch.Generator().manual_seed(1))
    slow = [t.double().requires_grad_(i < 3) for i, t in enumerate(inputs)]
    (plain_joint(slow, mask, softcap) * weight.double()).sum().backward()
    fast = [t.to(device).requires_grad_(i < 3) for i, t in enumerate(inputs)]
    (attend(fast, mask.to(device), backend, softcap=softcap) * weight.to(device, dtype)).sum().backward()
    for found, expected in zip(fast[:3], slow[:3], strict=True):
        assert found.grad is not None and expected.grad is not None
        assert distance(found.grad, expected.grad) < 2 * TOLERANCE[dtype]
