"""PyTorch's kernels in our hands: every fusion, mask and grouping against float64, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from lightning_memlong.attention import retrieval_causal_attention
from tests.gpu.conftest import error
from tests.gpu.kernels import Case, check

Measured = Callable[[str, float, float], None]
DTYPES = [torch.float32, torch.bfloat16]
CASES = [
    Case("joint"),
    Case("joint", (4, 4), mask="ragged"),
    Case("joint", (4, 2), mask="empty"),
    Case("joint", (4, 1), size=100),
    Case("gated"),
    Case("gated", (4, 4), mask="ragged"),
    Case("gated", (4, 1), mask="empty", size=100),
    Case("gated", groups=3, mask="empty"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "two_part"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, backend: str, dtype: torch.dtype, device: torch.device, measured: Measured) -> None:
    if device.type == "cuda" and backend == "auto" and case.groups > 1:
        pytest.skip("FlexAttention there: see test_flex.py")
    check(case, backend, dtype, device, measured)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["full", "empty"])
def test_groups_in_one_masked_call(mask: str, dtype: torch.dtype, device: torch.device, measured: Measured) -> None:
    check(Case("joint", groups=3, mask=mask), "sdpa", dtype, device, measured)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fusion", ["joint", "gated"])
def test_capped_scores_in_plain_operations(
    fusion: str, dtype: torch.dtype, device: torch.device, measured: Measured
) -> None:
    check(Case(fusion, mask="ragged", softcap=5.0), "sdpa", dtype, device, measured)


def test_is_causal_attention_over_as_many_keys(device: torch.device, measured: Measured) -> None:
    """What ``benchmarks/gpu.py`` times it against computes the same numbers."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mixer = torch.Generator().manual_seed(0)
    query, *rest = (torch.randn(1, 4, n, 64, generator=mixer).to(device, dtype) for n in (64, 64, 64, 128, 128))
    key, value, memory_key, memory_value = rest
    whole = [torch.cat([m, t], dim=2) for m, t in ((memory_key, key), (memory_value, value))]
    plain = torch.nn.functional.scaled_dot_product_attention(query, *whole, attn_mask=causal_lower_right(64, 192))
    ours = retrieval_causal_attention(query, key, value, memory_key, memory_value)
    measured("joint attention against one causal call over as many keys", error(ours, plain), 2e-2)
