"""The check that CUDA's kernels pass on a card before ``auto`` takes them, with those of ``tests/cuda_kernels.py``."""

import logging
from collections.abc import Iterator

import pytest
import torch

from lightning_memlong.attention import cuda_check, cuda_kernel
from lightning_memlong.attention.functional import choose_kernel
from lightning_memlong.attention.inputs import Scores
from tests import cuda_kernels
from tests.simulated_card import CARD, simulated_card

PLAIN = Scores(0.2)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known of any card, and kernels are there."""
    cuda_check._checked.cache_clear()
    cuda_kernels.patched(monkeypatch)
    yield
    cuda_check._checked.cache_clear()


def taken(dtype: torch.dtype = torch.float32, size: int = 32) -> str:
    """What ``auto`` takes on a card."""
    with simulated_card(), torch.inference_mode():  # a run may begin with validation
        return choose_kernel("auto", torch.zeros(1, 4, 8, size, dtype=dtype, device=CARD), 1, PLAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 100])
def test_kernels_that_are_right_are_taken(dtype: torch.dtype, size: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert taken(dtype, size) == taken(dtype, size) == "cuda_two_part"
    assert caplog.text.count("checked: relative error") == 1, "once a card, type and size"


WRONG = {
    "output": ("flash", lambda found: (found[0] * 1.5, *found[1:])),
    "log-sum-exp": ("efficient", lambda found: (found[0], found[1] + 1.0, *found[2:])),
    "gradient": ("flash_backward", lambda found: (found[0], -found[1], found[2])),
    "gradient under a mask": ("efficient_backward", lambda found: (found[0] * 0, *found[1:])),
}


@pytest.mark.parametrize("what", WRONG)
def test_kernels_that_are_wrong_are_not(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, spoilt = WRONG[what]
    right = getattr(cuda_kernel, name)
    monkeypatch.setattr(cuda_kernel, name, lambda *args, **options: spoilt(right(*args, **options)))
    assert taken(torch.bfloat16) == "sdpa_masked"
    assert "differ or fail (relative error" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("no kernel image\nis there"), TypeError("takes 8 arguments")])
def test_kernels_that_fail_are_not(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cuda_kernel, "flash", fails)
    monkeypatch.setattr(cuda_kernel, "efficient", fails)
    assert taken() == "sdpa_masked" and f"({str(error).splitlines()[0]})" in caplog.text


def test_the_numbers_of_others_are_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    taken()
    assert torch.equal(torch.rand(1), expected), "resumed runs draw the same"
