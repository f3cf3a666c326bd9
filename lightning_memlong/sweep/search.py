"""Search over options by Optuna (extra: search); its trials are runs of a sweep like any other."""

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from lightning_memlong.config import require
from lightning_memlong.distributed import say
from lightning_memlong.sweep.execute import results
from lightning_memlong.sweep.launchers import extra
from lightning_memlong.sweep.plan import Cell, Choice, Plan, Run

METRIC = "perplexity"


def search(plan: Plan, launch: Callable[[list[Run]], None]) -> None:
    """Try as many cells as the search has trials; an interrupted search goes on, its last trial first.

    Args:
        plan: Of a sweep with a search; cells are added to it.
        launch: Makes runs, those that are not made yet.
    """
    settings = plan.sweep.search
    optuna = extra("optuna", "search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan.folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(plan.folder / "optuna.log"))
    )
    study = optuna.create_study(storage=storage, study_name=plan.name, load_if_exists=True)
    # A sampler of the same seed would begin again with the trials that are made.
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.trials))
    noted = study.user_attrs.get("space")
    allowed = f"{noted}, with which this study was begun"
    require(noted in (None, settings.space), "search.space", settings.space, allowed, "give another --name")
    study.set_user_attr("space", settings.space)
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):  # cut off: the same values again
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params)
    for trial in study.get_trials(states=(states.COMPLETE,)):
        plan.add(_cell(trial.params))
    while len(study.get_trials(states=(states.COMPLETE,))) < settings.trials and not _all_fail(study, states):
        trial = study.ask()
        cell = plan.add(_cell({option: _suggest(trial, option, space) for option, space in settings.space.items()}))
        runs = plan.runs([cell])
        launch(runs)
        found = [measured[METRIC] for run in runs if (measured := results(run)) is not None]
        if len(found) < len(runs) or not all(map(math.isfinite, found)):
            study.tell(trial, state=states.FAIL)
        else:
            study.tell(trial, fmean(found))
            best = study.best_trial
            say(
                f"Trial {trial.number}: {cell.name}: {fmean(found):.3f}; best {best.value:.3f}: {best.params}",
                flush=True,
            )


def _cell(params: Mapping[str, Any]) -> Cell:
    return Cell({option: Choice(options={option: value}) for option, value in params.items()})


def _suggest(trial: Any, option: str, space: Any) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(option, space)
    low, high = space["low"], space["high"]
    more = {k: v for k, v in space.items() if k in ("log", "step")}
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(option, low, high, **more)
    value = trial.suggest_float(option, float(low), float(high), **more)
    return value if "step" in space else float(f"{value:.3g}")


def _all_fail(study: Any, states: Any) -> bool:
    """Three failures in a row are no accident."""
    last = [trial.state for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()][-3:]
    return len(last) == 3 and all(state == states.FAIL for state in last)
