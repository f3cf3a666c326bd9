"""What a sweep is made of: values of axes, trials that combine them, and the runs of a trial."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_memlong.config import require
from lightning_memlong.shipped import INSTALLED, find_yaml
from lightning_memlong.sweep.settings import Sweep

TRAIN = None if INSTALLED else Path(__file__).parents[2] / "train.py"
"""The entry point of a checkout; an installed package has the command ``memlong`` instead."""
BASELINE = "baseline"


@dataclass(frozen=True)
class AxisValue:
    """A value of an axis: further ``--config`` files and options."""

    files: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Short, for names and figures."""
        values = [f"{option.rpartition('.')[2]}={_short(value)}" for option, value in self.options.items()]
        return ",".join([*(Path(file).stem for file in self.files), *values])


@dataclass
class Trial:
    """One setting of everything that is varied, run with each seed; in a sweep's file and in its report, a cell."""

    axes: dict[str, AxisValue]
    """Axis -> what it is set to."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every setting of its runs as the command line resolves it, with dotted keys; paths and seed aside."""
    steps: int | None = None
    """Optimiser steps of a run that follow from the sweep's tokens."""

    @property
    def name(self) -> str:
        """What differs."""
        return ",".join(value.label for value in self.axes.values()) or BASELINE

    def arguments(self) -> list[str]:
        """For the command line, ``--config`` files first."""
        files = [word for value in self.axes.values() for file in value.files for word in ("--config", file)]
        return files + [word for value in self.axes.values() for word in as_arguments(value.options)]


@dataclass(frozen=True)
class AxisPoint:
    """Where a trial stands on an axis."""

    axis: str
    value: Any
    """Of the axis' option, or the label of a file or of several options."""
    others: str
    """What the trial's other axes are set to."""
    trial: Trial


@dataclass
class Run:
    """One run of a trial."""

    trial: Trial
    seed: int
    folder: Path
    arguments: list[str]
    """Of the command line, the subcommand first."""
    subcommand: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def settings(self) -> dict[str, Any]:
        """What it must have been made with to be taken as done."""
        steps = {} if self.trial.steps is None else {"trainer.max_steps": self.trial.steps}
        return {**self.trial.settings, **steps, "seed_everything": self.seed}


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as a person would type them."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options.items()}
    return [word for option, text in texts.items() for word in (f"--{option}", text)]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isalnum() or c in "._-+[]" else "-" for c in text.replace(", ", "-"))[:60]


def make_axis_value(axis: str, value: Any) -> AxisValue:
    """A value of an axis, as :class:`Sweep` says what it can be."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        find_yaml(value, axis)
        return AxisValue(files=(value,))
    if isinstance(value, Mapping):
        return AxisValue(options=dict(value))
    return AxisValue(options={axis: value})


def planned_trials(sweep: Sweep) -> Iterator[Trial]:
    """The trials that a sweep's file names, the baseline first; those of a search are chosen as it goes."""
    yield Trial({})
    for axis, values in sweep.axes.items():
        yield from (Trial({axis: make_axis_value(axis, value)}) for value in values)
    if sweep.grid:
        for combination in itertools.product(*sweep.grid.values()):
            pairs = zip(sweep.grid, combination, strict=True)
            yield Trial({axis: make_axis_value(axis, value) for axis, value in pairs})
    for number, value in enumerate(sweep.cells):
        ok = isinstance(value, str | Mapping)
        require(ok, f"cells[{number}]", value, "a mapping of options, or a file", "write {memory.top_k: 4}")
        yield Trial({"cells": make_axis_value("cells", value)})
