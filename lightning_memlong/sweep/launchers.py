"""Where runs are made: here one after the other, as a SLURM job array (submitit), or on a Ray cluster."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_memlong.errors import UserError
from lightning_memlong.sweep.execute import Outcome, Watch, execute
from lightning_memlong.sweep.trials import Run

Launch = Callable[..., Iterator[Outcome]]
Make = Callable[..., Outcome]
"""Makes one of what is launched, in the process it is called in; it and what it is given can be pickled."""


def here(
    runs: list[Run], options: dict[str, Any], folder: Path, watch: Callable[[Run], Watch], make: Make = execute
) -> Iterator[Outcome]:
    """One after the other."""
    for run in runs:
        yield make(run, watch(run))


def slurm(
    runs: list[Run], options: dict[str, Any], folder: Path, watch: Callable[[Run], Watch], make: Make = execute
) -> Iterator[Outcome]:
    """A job array; outcomes come as jobs end.

    Args:
        runs: To be made.
        options: ``cluster`` (slurm, or local to try it), and parameters of the executor.
        folder: For submitit's own files.
        watch: Not used: progress is in the jobs' logs.
        make: What makes one of them.
    """
    submitit = extra("submitit", "slurm")
    parameters = dict(options)
    executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=parameters.pop("cluster", "slurm"))
    executor.update_parameters(**({"timeout_min": 24 * 60, "name": folder.name} | parameters))
    jobs = executor.map_array(make, runs)
    waiting = dict(zip(jobs, runs, strict=True))
    for job in submitit.helpers.as_completed(jobs):
        error = job.exception()
        yield job.result() if error is None else Outcome(waiting[job].name, "failed", reason=str(error))


def on_ray(
    runs: list[Run], options: dict[str, Any], folder: Path, watch: Callable[[Run], Watch], make: Make = execute
) -> Iterator[Outcome]:
    """Tasks of a Ray cluster, started here if there is none; outcomes come as tasks end.

    Args:
        runs: To be made.
        options: ``address`` of a cluster, and options of the tasks.
        folder: Not used.
        watch: Not used: progress is in the runs' logs.
        make: What makes one of them.
    """
    ray = extra("ray", "ray")
    resources = dict(options)
    ray.init(address=resources.pop("address", None), ignore_reinit_error=True, log_to_driver=False)
    task = ray.remote(**({"num_cpus": 1, "max_retries": 0} | resources))(make)
    waiting = {task.remote(run): run for run in runs}
    try:
        while waiting:
            done, _ = ray.wait(list(waiting))
            run = waiting.pop(done[0])
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayError as error:
                yield Outcome(run.name, "failed", reason=str(error))
    finally:
        ray.shutdown()


def extra(package: str, name: str) -> Any:
    """A package of an extra.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(
            f"launcher: the package {package} is not installed. Allowed: what the extra {name!r} brings. Fix: "
            f"pip install -e '.[{name}]' (in this folder)."
        ) from error


LAUNCHERS: dict[str, Launch] = {"local": here, "slurm": slurm, "ray": on_ray}
