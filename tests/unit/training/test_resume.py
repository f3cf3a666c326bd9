"""A resumed run's own rates, put over those of its checkpoint."""

from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, StepLR

from lightning_memlong.training.resume import keep_recipe
from lightning_memlong.training.schedule import LinearWarmup


def made(lr: float, total_steps: int, step: bool = False) -> tuple[SGD, LRScheduler]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    return optimizer, StepLR(optimizer, 1, 0.5) if step else LinearWarmup(optimizer, 2, total_steps)


def saved(optimizer: SGD, schedule: LRScheduler, steps: int) -> dict[str, Any]:
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    return {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}


def go_on(checkpoint: dict[str, Any], optimizer: SGD, schedule: LRScheduler) -> list[float]:
    """The rates of the steps that follow, as Lightning loads it."""
    keep_recipe(checkpoint, optimizer.param_groups, [], schedule)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    schedule.load_state_dict(checkpoint["lr_schedulers"][0])
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_a_run_that_is_made_longer_follows_its_own_schedule_from_the_first_step_on() -> None:
    assert go_on(saved(*made(1.0, 4), 4), *made(1.0, 8)) == pytest.approx([4 / 6, 3 / 6, 2 / 6])
    assert go_on(saved(*made(1.0, 8), 3), *made(1.0, 8)) == [5 / 6, 4 / 6, 3 / 6], "the same run, the same rates"


@pytest.mark.parametrize("before", [0.0, 0.5])
def test_another_rate_is_taken(before: float) -> None:
    assert go_on(saved(*made(before, 8), 3), *made(2.0, 8)) == pytest.approx([10 / 6, 8 / 6, 6 / 6])


def test_a_schedule_that_knows_only_its_last_rate_goes_on_from_it() -> None:
    assert go_on(saved(*made(1.0, 0, step=True), 2), *made(4.0, 0, step=True)) == [1.0, 0.5, 0.25]
