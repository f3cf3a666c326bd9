"""A resumed run's own learning rate, weight decay and so on, put over those of its checkpoint."""

from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def keep_recipe(
    checkpoint: dict[str, Any], fresh: list[dict[str, Any]], live: list[dict[str, Any]], schedule: Any = None
) -> None:
    """Let this run's settings win over those in a saved optimiser and schedule, in place.

    Where the schedule says what the rate is at a step, such as the project's own, that is this run's from the first
    step on; others go on from the rate that was saved.

    Args:
        checkpoint: Its content.
        fresh: Parameter groups of an optimiser made from this run's settings.
        live: Parameter groups that were loaded already; empty if the checkpoint's still will be.
        schedule: Made from this run's settings.
    """
    factors, bases = list[float](), list[float]()
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    for saved, new in zip(groups, fresh, strict=True):
        base = "initial_lr" if "initial_lr" in saved and "initial_lr" in new else "lr"
        factors.append(new[base] / saved[base] if saved[base] and new[base] != saved[base] else 1.0)
        bases.append(new[base])
        kept = {"params": saved["params"], "lr": saved["lr"] * factors[-1] if saved[base] else new[base]}
        saved.update({key: value for key, value in new.items() if key in saved} | kept)
    for state in checkpoint["lr_schedulers"]:
        for key in {"base_lrs", "_last_lr"} & {*state}:
            state[key] = [rate * factor for rate, factor in zip(state[key], factors, strict=True)]
        if isinstance(schedule, LambdaLR):
            rates = [base * at(state["last_epoch"]) for base, at in zip(bases, schedule.lr_lambdas, strict=True)]
            state |= {"base_lrs": bases, "_last_lr": rates}
            for saved, rate in zip(groups, rates, strict=True):
                saved["lr"] = rate
    for held, saved in zip(live, groups, strict=False):
        held.update({key: value for key, value in saved.items() if key != "params"})
