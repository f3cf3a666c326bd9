"""The learning rate along a run."""

import pytest
import torch

from lightning_memlong.training.schedule import LinearWarmup


def rates(total_steps: int | None) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LinearWarmup(optimizer, warmup_steps=2, total_steps=total_steps)
    found = []
    for _ in range(6):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("unlimited", [None, -1])
def test_a_run_without_a_last_step_stays_at_the_top(unlimited: int | None) -> None:
    assert rates(unlimited) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_it_rises_and_falls() -> None:
    assert rates(6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
