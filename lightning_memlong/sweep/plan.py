"""Which runs a sweep has."""

import glob
import os
from pathlib import Path
from typing import Any

from lightning_memlong.cli.parser import typed_option
from lightning_memlong.config import require
from lightning_memlong.sweep.resolve import ConfigResolver, tokens_a_step
from lightning_memlong.sweep.settings import Sweep
from lightning_memlong.sweep.trials import AxisPoint, Run, Trial, as_arguments, make_axis_value, planned_trials

OWN = {
    "seed_everything": "seeds", "trainer.logger": "output and name", "trainer.logger.save_dir": "output",
    "trainer.logger.name": "name", "trainer.logger.version": "name",
}  # fmt: skip
"""Options of a run that a sweep says, and by what."""


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
        self.sweep, self.name, self.folder = sweep, name, Path(sweep.output) / name
        base = make_axis_value("baseline", sweep.baseline or {})
        ok = "baseline" not in base.options
        require(ok, "baseline", sweep.baseline, "a mapping of options, or a file", "write {memory.top_k: 4}")
        files = [word for file in (*sweep.base, *base.files) for word in ("--config", file)]
        self._shared = [*files, *as_arguments(sweep.overrides), *as_arguments(base.options), *typed]
        self._check_options(typed)
        self.trials: list[Trial] = []
        self.points: list[AxisPoint] = []
        self._resolver = ConfigResolver(sweep.subcommand)
        for trial in () if sweep.search.space else planned_trials(sweep):
            self.add(trial)

    def _check_options(self, typed: list[str]) -> None:
        """Refuse options that are given to all runs and varied as well, and those that a sweep says itself.

        Raises:
            UserError: For the first of them.
        """
        sweep = self.sweep
        given = {typed_option(word[2:].partition("=")[0]) for word in typed if word.startswith("--")}
        values = [make_axis_value(axis, value) for group in (sweep.axes, sweep.grid) for axis in group
                  for value in group[axis]] + [make_axis_value("cells", value) for value in sweep.cells]  # fmt: skip
        varied = {typed_option(option) for value in values for option in value.options}
        varied |= {typed_option(option) for option in sweep.search.space}
        for option in sorted(given & varied):
            fix = f"leave it out, or change the file of {self.name}"
            require(False, option, f"--{option}", "what the sweep does not vary", fix)
        own = OWN | ({"trainer.max_steps": "tokens"} if sweep.tokens is not None else {})
        for option in sorted((given | varied) & {*own}):
            require(False, option, f"set for runs of {self.name}", f"what {own[option]} of the sweep says", "use that")

    def add(self, trial: Trial) -> Trial:
        """Resolve a trial; one whose settings are those of an earlier one is that one, under one more axis."""
        arguments = [self.sweep.subcommand, *self._shared, *trial.arguments()]
        trial.settings = self._resolver.settings_of_runs(f"{self.name}, cell {trial.name}", arguments)
        self._check_text(trial)
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

    def _check_text(self, trial: Trial) -> None:
        """Look whether text of this machine is there: else each run would say that it is not."""
        path = trial.settings.get("data.init_args.path")
        if not isinstance(path, str) or "://" in path:
            return
        there = os.path.exists(path) or glob.glob(path, recursive=True)
        key = f"{self.name}, cell {trial.name}: data.path"
        require(bool(there), key, path, "a file, folder, glob or address that is there", "correct the path")

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
