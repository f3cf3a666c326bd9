"""Learning-rate schedules."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LinearWarmup(LambdaLR):
    """Rises linearly over ``warmup_steps``, then falls linearly to zero at ``total_steps`` (paper, section 3).

    A class of its own, since the command line makes schedules from classes, transformers' is a function
    (``get_linear_schedule_with_warmup``) without a rate that stays at the top, and its first step has a rate of zero.

    Args:
        optimizer: Set by the framework.
        warmup_steps: Steps of the rise [optimiser steps].
        total_steps: Step at which the rate is zero [optimiser steps]; null, or -1 as of an unlimited
            trainer.max_steps: stay at the top.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 1000, total_steps: int | None = None) -> None:
        def rate(step: int) -> float:
            rise = min(1.0, (step + 1) / max(1, warmup_steps))
            if total_steps is None or total_steps < 0 or step < warmup_steps:
                return rise
            return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

        super().__init__(optimizer, rate)
