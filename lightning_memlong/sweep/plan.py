"""Which runs a sweep has."""

from pathlib import Path
from typing import Any

from lightning_memlong.cli.parser import typed_option
from lightning_memlong.config import require
from lightning_memlong.sweep.resolve import ConfigResolver, tokens_a_step
from lightning_memlong.sweep.settings import Sweep
from lightning_memlong.sweep.trials import TRAIN, AxisPoint, Run, Trial, as_arguments, make_axis_value, planned_trials


class Plan:
    """Which runs a sweep has, checked before the first begins.

    Args:
        sweep: The sweep.
        name: Of the sweep.
        typed: Options of every run that were typed on the command line.

    Raises:
        UserError: If one cannot be made.
    """

    def __init__(self, sweep: Sweep, name: str, typed: list[str]) -> None:
        require(TRAIN.is_file(), "sweep", str(TRAIN), "a checkout of the project, with train.py", "run it in one")
        self.sweep, self.name, self.folder = sweep, name, Path(sweep.output) / name
        base = make_axis_value("baseline", sweep.baseline or {})
        ok = "baseline" not in base.options
        require(ok, "baseline", sweep.baseline, "a mapping of options, or a file", "write {memory.top_k: 4}")
        files = [word for file in (*sweep.base, *base.files) for word in ("--config", file)]
        self._shared = [*files, *as_arguments(sweep.overrides), *as_arguments(base.options), *typed]
        self._check_typed(typed)
        self.trials: list[Trial] = []
        self.points: list[AxisPoint] = []
        self._resolver = ConfigResolver(sweep.subcommand)
        for trial in () if sweep.search.space else planned_trials(sweep):
            self.add(trial)

    def _check_typed(self, typed: list[str]) -> None:
        """Refuse an option that is given to all runs and varied as well."""
        varied = {typed_option(option) for option in (*self.sweep.axes, *self.sweep.grid, *self.sweep.search.space)}
        for word in typed:
            option = word.removeprefix("--").partition("=")[0]
            ok = not word.startswith("--") or typed_option(option) not in varied
            require(ok, option, word, "what the sweep varies", "leave it out, or change the sweep's file")

    def add(self, trial: Trial) -> Trial:
        """Resolve a trial; one whose settings are those of an earlier one is that one, under one more axis."""
        arguments = [self.sweep.subcommand, *self._shared, *trial.arguments()]
        trial.settings = self._resolver.settings_of_runs(trial.name, arguments)
        if self.sweep.tokens is not None:
            trial.steps = max(1, round(self.sweep.tokens / tokens_a_step(trial.settings)))
        same = next((other for other in self.trials if other.settings == trial.settings), None)
        if same is None:
            taken = any(other.name == trial.name for other in self.trials)
            allowed = "values whose names differ"
            require(not taken, "axes", trial.name, allowed, "name the file, or the option's value, differently")
            self.trials.append(trial)
        for axis, value in trial.axes.items():
            others = ",".join(other.label for name, other in trial.axes.items() if name != axis)
            self.points.append(AxisPoint(axis, value.options.get(axis, value.label), others, same or trial))
        return same or trial

    def runs(self, trials: list[Trial] | None = None) -> list[Run]:
        """The runs of trials, of all of them by default: all trials with the first seed, then with the next."""
        chosen = self.trials if trials is None else trials
        return [self._run(trial, seed) for seed in self.sweep.seeds for trial in chosen]

    def _run(self, trial: Trial, seed: int) -> Run:
        folder = self.folder / f"{trial.name},seed={seed}"
        own: dict[str, Any] = {"seed_everything": seed} | (
            {} if trial.steps is None else {"trainer.max_steps": trial.steps}
        )
        own |= {"trainer.logger.save_dir": self.sweep.output, "trainer.logger.name": self.name,
                "trainer.logger.version": folder.name}  # fmt: skip
        arguments = [*self._shared, *trial.arguments(), *as_arguments(own)]
        return Run(trial, seed, folder, [self.sweep.subcommand, *arguments], self.sweep.subcommand)
