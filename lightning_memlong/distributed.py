"""What several processes must agree on."""

import sys
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

say = rank_zero_only(print)
"""Prints once, however many processes there are."""


@rank_zero_only
def note(text: str) -> None:
    """Print beside the results, on stderr: what is piped on are answers alone."""
    print(text, file=sys.stderr, flush=True)


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@cache
def _cpu_group(world: Any) -> Any:
    # Through a group of its own on the CPU, agreeing never waits for the GPU.
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask.

    Lightning's ``strategy.reduce_boolean_decision`` asks through the device, and needs a trainer; a stream asks before
    each batch, on the CPU.
    """
    if rank_and_world()[1] == 1:
        return flag
    told = torch.tensor(int(flag))
    dist.all_reduce(told, dist.ReduceOp.MAX, group=_cpu_group(dist.group.WORLD))
    return bool(told)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, in the first one, which writes checkpoints; all must ask."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.gather_object(value, values if rank == 0 else None, dst=0, group=_cpu_group(dist.group.WORLD))
    return values
