"""Each check here runs on the CPU and, where there is one, on a CUDA card: no network, no weights, no other plugin.

Those that need no kernel of a card also run on a simulated one, which tells of tensors in the wrong place.
"""

import json
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.simulated_card import CARD, simulated_card

ROWS = "MEMLONG_GPU_ROWS"
"""Environment variable: a file that measured numbers are added to, a line of JSON each; see benchmarks/gpu.py."""
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where each check runs; modules say by ``SIMULATED`` that a simulated card will do, where there is no other."""
    if "device" in metafunc.fixturenames:
        wanted = getattr(metafunc.module, "SIMULATED", False) and not torch.cuda.is_available()
        simulated = ["simulated"] if wanted else []
        places = ["cpu", *simulated, pytest.param("cuda", marks=[pytest.mark.gpu, NO_CARD])]
        metafunc.parametrize("device", places, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a check runs."""
    if request.param == "simulated":
        with simulated_card():
            yield CARD
    else:
        yield torch.device(request.param)


@pytest.fixture(autouse=True)
def plain_arithmetic() -> Iterator[None]:
    """No TF32, and no compiled kernel of an earlier check: past eight of them PyTorch falls back to a slow one."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()


@pytest.fixture
def measured(device: torch.device) -> Callable[[str, float, float], None]:
    """Check that a number is below its goal, and note it, for whoever wants a table."""

    def note(what: str, number: float, goal: float) -> None:
        if file := os.environ.get(ROWS):
            with open(file, "a") as stream:
                stream.write(json.dumps({"what": what, "device": device.type, "number": number, "goal": goal}) + "\n")
        assert number <= goal, f"{what} on {device}: {number:.3g}, at most {goal:.3g} is allowed"

    return note


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))
