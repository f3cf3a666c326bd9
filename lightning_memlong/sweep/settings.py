"""What a sweep file says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_memlong.config import require, require_choice, require_types

Launcher = Literal["local", "slurm", "ray"]
Subcommand = Literal["fit", "validate"]


def _is_range(values: Any) -> bool:
    """Whether Optuna can draw from it."""
    if not isinstance(values, Mapping) or not {"low", "high"} <= {*values} <= {"low", "high", "log", "step"}:
        return False
    numbers = [value for name, value in values.items() if name != "log"]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        return False
    low, log, step = values["low"], values.get("log", False), values.get("step", 1)
    wrong = log and (low <= 0 or "step" in values)  # as Optuna has it
    return isinstance(log, bool) and bool(low < values["high"] and step > 0 and not wrong)


@dataclass
class Search:
    """A search by Optuna over options (extra: search)."""

    trials: int = 20
    """Trials in all, those of an interrupted search included."""
    space: dict[str, Any] = field(default_factory=dict)
    """Option -> a list of values to choose from, or {low, high}, with log: true or a step; empty: no search."""
    seed: int = 0
    """Seed of the sampler (TPE)."""

    def __post_init__(self) -> None:
        """Check the space."""
        require_types(self, "search")
        require(self.trials >= 1, "search.trials", self.trials, "1 or more", "raise it")
        for option, values in self.space.items():
            allowed = "a list of values, or numbers low and high above it (above 0 with log), with log or step"
            ok = _is_range(values) or (isinstance(values, list) and bool(values))
            require(ok, f"search.space.{option}", values, allowed, "write [2, 4, 8] or {low: 1.0e-5, high: 1.0e-3}")


@dataclass
class Sweep:
    """Runs that differ in a few options of the command line. A value is one of three things.

    A plain value is that of the option its axis is named after; a file that ends in .yaml is a further ``--config``;
    a mapping holds several options.
    """

    name: str | None = None
    """Name of the sweep and of its folder; null: that of the file."""
    base: list[str] = field(default_factory=lambda: ["conf/memlong.yaml"])
    """``--config`` files of every run."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Options of every run, such as {data.window: 1024}; options typed after the sweep's own are added."""
    baseline: Any = None
    """What the others are compared with: a mapping of options or a file; null: nothing differs."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """Axis -> values, each changed alone, all else as in the baseline."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Axis -> values, all combinations."""
    cells: list[Any] = field(default_factory=list)
    """Single cells: each a mapping of options or a file."""
    search: Search = field(default_factory=Search)
    """A search, instead of axes, grid and cells."""
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    """Every cell is run with each of these seeds."""
    tokens: int | None = None
    """Text each run is trained on [tokens]; null: as trainer.max_steps says."""
    subcommand: Subcommand = "fit"
    """fit; or validate, to compare without training."""
    output: str = "runs/sweeps"
    """Folder the sweep's folder is made in."""
    launcher: Launcher = "local"
    """Where runs are made: local (here, one after the other), slurm (a job array, by submitit; extra: slurm), ray
    (extra: ray)."""
    launcher_args: dict[str, Any] = field(default_factory=dict)
    """slurm: parameters of submitit's executor ({slurm_partition: gpu, timeout_min: 600}), and cluster: local to try it
    on this machine. ray: options of a task ({num_gpus: 1}), and address."""

    def __post_init__(self) -> None:
        """Check the values against each other."""
        require_types(self, "sweep")
        require_choice("launcher", self.launcher, Launcher)
        require_choice("subcommand", self.subcommand, Subcommand)
        ok = not self.launcher_args or self.launcher != "local"
        require(ok, "launcher_args", self.launcher_args, "nothing for launcher local", "leave it out, or set launcher")
        ok = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(ok, "seeds", self.seeds, "at least one, each once", "correct the list")
        planned, searched = bool(self.axes or self.grid or self.cells), bool(self.search.space)
        allowed = "axes, grid or cells, or else search.space"
        require(planned != searched, "axes", self.axes, allowed, "give one of the two")
        for group in ("axes", "grid"):
            for axis, values in getattr(self, group).items():
                allowed = "names as text"
                require(
                    isinstance(axis, str), group, axis, allowed, "put it in quotes: YAML reads on, no as truth values"
                )
                ok = isinstance(values, list) and bool(values)
                require(ok, f"{group}.{axis}", values, "a list of values", "write [2, 4, 8]")
        fixed = [option for option in ("trainer.max_steps", "seed_everything") if option in self.overrides]
        if self.tokens is not None:
            require(self.tokens >= 1, "tokens", self.tokens, "1 or more tokens, or null", "raise it")
            require(self.subcommand == "fit", "tokens", self.tokens, "null for subcommand validate", "leave it out")
            ok = "trainer.max_steps" not in fixed
            require(ok, "tokens", self.tokens, "null beside overrides.trainer.max_steps", "leave one of the two out")
        ok = "seed_everything" not in fixed
        require(ok, "overrides.seed_everything", fixed, "nothing: seeds says it", "use seeds")
