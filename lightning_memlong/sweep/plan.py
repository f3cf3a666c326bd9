"""The runs of a sweep: cells, their names, and their settings as the command line resolves them."""

import io
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_memlong.cli.main import MemLongCLI, user_error
from lightning_memlong.cli.parser import plain
from lightning_memlong.config import MemoryConfig, RetrieverConfig, flat, require
from lightning_memlong.errors import UserError
from lightning_memlong.sweep.settings import Sweep

TRAIN = Path(__file__).parents[2] / "train.py"
BASELINE = "baseline"


@dataclass(frozen=True)
class Choice:
    """A value of an axis: further ``--config`` files and options."""

    files: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Short, for names and figures."""
        values = [f"{option.rpartition('.')[2]}={_short(value)}" for option, value in self.options.items()]
        return ",".join([*(Path(file).stem for file in self.files), *values])


@dataclass
class Cell:
    """One place of a sweep: what differs from what all its runs share."""

    choices: dict[str, Choice]
    """Axis -> what it is set to."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every setting of its runs as the command line resolves it, with dotted keys; paths and seed aside."""
    steps: int | None = None
    """Optimiser steps of a run that follow from the sweep's tokens."""

    @property
    def name(self) -> str:
        """What differs."""
        return ",".join(choice.label for choice in self.choices.values()) or BASELINE

    def arguments(self) -> list[str]:
        """For the command line, ``--config`` files first."""
        files = [word for choice in self.choices.values() for file in choice.files for word in ("--config", file)]
        return files + [word for choice in self.choices.values() for word in as_arguments(choice.options)]


@dataclass(frozen=True)
class Point:
    """Where a cell stands on an axis."""

    axis: str
    value: Any
    """Of the axis' option, or the label of a file or of several options."""
    others: str
    """What the cell's other axes are set to."""
    cell: Cell


@dataclass
class Run:
    """One run of a cell."""

    cell: Cell
    seed: int
    folder: Path
    arguments: list[str]
    """Of ``train.py``."""
    subcommand: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def settings(self) -> dict[str, Any]:
        """What it must have been made with to be taken as done."""
        steps = {} if self.cell.steps is None else {"trainer.max_steps": self.cell.steps}
        return {**self.cell.settings, **steps, "seed_everything": self.seed}


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as a person would type them."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options.items()}
    return [word for option, text in texts.items() for word in (f"--{option}", text)]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isalnum() or c in "._-[]" else "-" for c in text.replace(", ", "-"))[:60]


def choice(axis: str, value: Any) -> Choice:
    """A value of an axis, as :class:`Sweep` says what it can be."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        require(Path(value).is_file(), axis, value, "a file that is there", "correct the path")
        return Choice(files=(value,))
    if isinstance(value, Mapping):
        return Choice(options=dict(value))
    return Choice(options={axis: value})


def _cells(sweep: Sweep) -> Iterator[Cell]:
    yield Cell({})
    for axis, values in sweep.axes.items():
        yield from (Cell({axis: choice(axis, value)}) for value in values)
    if sweep.grid:
        for combination in itertools.product(*sweep.grid.values()):
            yield Cell({axis: choice(axis, value) for axis, value in zip(sweep.grid, combination, strict=True)})
    for number, value in enumerate(sweep.cells):
        ok = isinstance(value, str | Mapping)
        require(ok, f"cells[{number}]", value, "a mapping of options, or a file", "write {memory.top_k: 4}")
        yield Cell({"cells": choice("cells", value)})


class Plan:
    """Which runs a sweep has, checked before the first begins.

    Args:
        sweep: The sweep.
        name: Of the sweep.
        typed: Options of every run that were typed on the command line.

    Raises:
        UserError: If a cell cannot be run.
    """

    def __init__(self, sweep: Sweep, name: str, typed: list[str]) -> None:
        require(TRAIN.is_file(), "sweep", str(TRAIN), "a checkout of the project, with train.py", "run it in one")
        self.sweep, self.name, self.folder = sweep, name, Path(sweep.output) / name
        base = choice("baseline", sweep.baseline or {})
        ok = "baseline" not in base.options
        require(ok, "baseline", sweep.baseline, "a mapping of options, or a file", "write {memory.top_k: 4}")
        files = [word for file in (*sweep.base, *base.files) for word in ("--config", file)]
        self._shared = [*files, *as_arguments(sweep.overrides), *as_arguments(base.options), *typed]
        varied = {*sweep.axes, *sweep.grid, *sweep.search.space}
        for word in typed:
            option = word.removeprefix("--").partition("=")[0]
            fix = "leave it out, or change the sweep's file"
            require(not word.startswith("--") or option not in varied, option, word, "what the sweep varies", fix)
        self.cells: list[Cell] = []
        self.points: list[Point] = []
        self._resolver: _Resolved | None = None
        for cell in () if sweep.search.space else _cells(sweep):
            self.add(cell)

    def add(self, cell: Cell) -> Cell:
        """Resolve a cell; one whose settings are those of an earlier one is that one, under one more axis."""
        cell.settings = self._resolve(cell)
        if self.sweep.tokens is not None:
            cell.steps = max(1, round(self.sweep.tokens / _tokens_a_step(cell.settings)))
        same = next((c for c in self.cells if c.settings == cell.settings), None)
        if same is None:
            taken = [c for c in self.cells if c.name == cell.name]
            allowed = "values whose names differ"
            require(not taken, "axes", cell.name, allowed, "name the file, or the option's value, differently")
            self.cells.append(cell)
        for axis, chosen in cell.choices.items():
            others = ",".join(c.label for a, c in cell.choices.items() if a != axis)
            self.points.append(Point(axis, chosen.options.get(axis, chosen.label), others, same or cell))
        return same or cell

    def runs(self, cells: list[Cell] | None = None) -> list[Run]:
        """The runs of cells, of all of them by default: all cells with the first seed, then with the next."""
        chosen = self.cells if cells is None else cells
        return [self._run(cell, seed) for seed in self.sweep.seeds for cell in chosen]

    def _run(self, cell: Cell, seed: int) -> Run:
        folder = self.folder / f"{cell.name},seed={seed}"
        own: dict[str, Any] = {"seed_everything": seed} | (
            {} if cell.steps is None else {"trainer.max_steps": cell.steps}
        )
        own |= {"trainer.logger.save_dir": self.sweep.output, "trainer.logger.name": self.name,
                "trainer.logger.version": folder.name}  # fmt: skip
        arguments = [*self._shared, *cell.arguments(), *as_arguments(own)]
        return Run(cell, seed, folder, [self.sweep.subcommand, *arguments], self.sweep.subcommand)

    def _resolve(self, cell: Cell) -> dict[str, Any]:
        arguments = [self.sweep.subcommand, *self._shared, *cell.arguments()]
        told = io.StringIO()
        try:
            with redirect_stderr(told):
                self._resolver = self._resolver or _Resolved(arguments)
                config = self._resolver.resolve(arguments)[self.sweep.subcommand]
            memory = dict(config["memory"])
            MemoryConfig(**memory | {"retriever": RetrieverConfig(**memory["retriever"])})
        except (SystemExit, ValueError) as error:
            why = str(user_error(error) or told.getvalue().removeprefix("error:").strip() or error)
            raise UserError(f"cell {cell.name}: {why}") from error
        windows = config["trainer"]["limit_val_batches"]
        allowed = "1 or more windows: runs are compared by the perplexity of the validation text"
        require(windows != 0, "trainer.limit_val_batches", windows, allowed, "raise it")
        for key in ("seed_everything", "ckpt_path"):
            config.pop(key, None)
        config["trainer"].pop("logger", None)
        return flat(config)


class _Resolved(MemLongCLI):
    """The command line up to its configuration; nothing is built."""

    def resolve(self, arguments: list[str]) -> dict[str, Any]:
        """The configuration that arguments give; the parser, which is slow to make, is kept."""
        self._argv = list(arguments)
        self.config = self.parser.parse_args(arguments)
        self._parse_ckpt_path()
        return plain(self.parser, self.config)

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def _tokens_a_step(settings: Mapping[str, Any]) -> int:
    """Fresh tokens an optimiser step is trained on."""
    advance = settings["data.init_args.stride"] or settings["data.init_args.window"]
    devices = settings["trainer.devices"]
    processes = devices if isinstance(devices, int) and devices > 0 else 1
    return advance * settings["data.init_args.batch_size"] * settings["trainer.accumulate_grad_batches"] * processes
