"""A resumed run's own learning rate, weight decay and so on, put over those of its checkpoint."""

from typing import Any


def keep_recipe(checkpoint: dict[str, Any], fresh: list[dict[str, Any]], live: list[dict[str, Any]]) -> None:
    """Let this run's settings win over those in a saved optimiser and schedule, in place.

    Args:
        checkpoint: Its content.
        fresh: Parameter groups of an optimiser made from this run's settings.
        live: Parameter groups that were loaded already; empty if the checkpoint's still will be.
    """
    factors = []
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    for saved, new in zip(groups, fresh, strict=True):
        base = "initial_lr" if "initial_lr" in saved and "initial_lr" in new else "lr"
        factors.append(new[base] / saved[base] if new[base] != saved[base] else 1.0)
        kept = {"params": saved["params"], "lr": saved["lr"] * factors[-1]}
        saved.update({key: value for key, value in new.items() if key in saved} | kept)
    for held, saved in zip(live, groups, strict=False):
        held.update({key: value for key, value in saved.items() if key != "params"})
    for schedule in checkpoint["lr_schedulers"]:
        for key in ("base_lrs", "_last_lr"):
            if key in schedule:
                schedule[key] = [rate * factor for rate, factor in zip(schedule[key], factors, strict=True)]
