"""FlexAttention: compiled on a card, which takes seconds for each case, so these are few and run last."""

from collections.abc import Callable

import pytest
import torch

from tests.gpu.kernels import Case, check

CASES = [
    (Case("joint", groups=3, mask="empty"), "auto", torch.bfloat16),  # what granularity chunk is trained with
    (Case("joint", mask="ragged", softcap=5.0), "auto", torch.bfloat16),  # Gemma 2
    (Case("joint", (4, 4), mask="ragged", size=100), "flex", torch.float32),
    (Case("gated", mask="empty"), "flex", torch.bfloat16),
    (Case("joint"), "flex", torch.bfloat16),
    (Case("gated", groups=3, softcap=5.0), "auto", torch.float32),
]


@pytest.mark.parametrize(("case", "backend", "dtype"), CASES, ids=[f"{c}-{b}-{d}" for c, b, d in CASES])
def test_equals_float64(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    measured: Callable[[str, float, float], None],
) -> None:
    backward = backend != "flex" or device.type == "cuda"  # FlexAttention has no gradients on the CPU
    check(case, backend, dtype, device, measured, backward)
