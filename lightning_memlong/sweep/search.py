"""Search over options by Optuna (extra: search); its trials are runs of a sweep like any other."""

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from lightning_memlong.config import require
from lightning_memlong.distributed import say
from lightning_memlong.sweep.execute import results
from lightning_memlong.sweep.launchers import extra
from lightning_memlong.sweep.plan import Plan
from lightning_memlong.sweep.trials import AxisValue, Run, Trial

METRIC = "perplexity"


def search(plan: Plan, launch: Callable[[list[Run]], None]) -> None:
    """Make as many trials as the search has; an interrupted search goes on, its last trial first.

    Args:
        plan: Of a sweep with a search; trials are added to it.
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
    same = noted in (None, settings.space) or not study.trials  # of what nothing was drawn from, nothing is known
    require(same, "search.space", settings.space, allowed, "give another --name")
    study.set_user_attr("space", settings.space)
    states = optuna.trial.TrialState
    for begun in study.get_trials(states=(states.RUNNING,)):  # cut off: the same values again
        study.tell(begun.number, state=states.FAIL)
        study.enqueue_trial(begun.params)
    for ended in study.get_trials(states=(states.COMPLETE,)):
        plan.add(_trial({option: _rounded(value, settings.space[option]) for option, value in ended.params.items()}))
    while len(study.get_trials(states=(states.COMPLETE,))) < settings.trials and not _all_fail(study, states):
        asked = study.ask()
        trial = plan.add(_trial({option: _suggest(asked, option, space) for option, space in settings.space.items()}))
        runs = plan.runs([trial])
        launch(runs)
        found = [measured[METRIC] for run in runs if (measured := results(run)) is not None]
        if len(found) < len(runs) or not all(map(math.isfinite, found)):
            study.tell(asked, state=states.FAIL)
        else:
            study.tell(asked, fmean(found))
            best = study.best_trial
            say(
                f"Trial {asked.number}: {trial.name}: {fmean(found):.3f}; best {best.value:.3f}: {best.params}",
                flush=True,
            )


def _trial(params: Mapping[str, Any]) -> Trial:
    return Trial({option: AxisValue(options={option: value}) for option, value in params.items()})


def _suggest(asked: Any, option: str, space: Any) -> Any:
    if isinstance(space, list):
        return asked.suggest_categorical(option, space)
    low, high = space["low"], space["high"]
    more = {k: v for k, v in space.items() if k in ("log", "step")}
    if isinstance(low, int) and isinstance(high, int):
        return asked.suggest_int(option, low, high, **more)
    return _rounded(asked.suggest_float(option, float(low), float(high), **more), space)


def _rounded(value: Any, space: Any) -> Any:
    """What a run gets of a number that the study has suggested."""
    return (
        float(f"{value:.3g}")
        if isinstance(value, float) and isinstance(space, Mapping) and "step" not in space
        else value
    )


def _all_fail(study: Any, states: Any) -> bool:
    """Three failures in a row are no accident."""
    last = [trial.state for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()][-3:]
    return len(last) == 3 and all(state == states.FAIL for state in last)
