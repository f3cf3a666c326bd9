"""What all evaluations share: what is evaluated, and what an evaluation gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from matplotlib.figure import Figure

from lightning_memlong.config import MemoryConfig, changed, require
from lightning_memlong.evaluation.record import Measurement, Record
from lightning_memlong.memlong import MemLong
from lightning_memlong.retrieval import Retrieval, Retriever, load_retriever


class Progress(Protocol):
    """Shows how far an evaluation is."""

    def begin(self, total: int, what: str) -> None:
        """Say how much there is to do [tokens]."""

    def advance(self, tokens: int) -> None:
        """Say that so much was done."""


@dataclass
class Subject:
    """A model with its memory and a corpus, as the command line made them."""

    model: MemLong
    tokenizer: Any
    memory: MemoryConfig
    data: Any
    """A :class:`datamodules.DocumentDataModule`, set up for testing."""
    backbone: str
    """Its name, for titles."""
    open_data: Callable[[str, str | Mapping[str, Any]], Any]
    """Sets up another corpus: its name, and its path or options of the data group."""
    progress: Progress
    autocast: Callable[[], AbstractContextManager[Any]]
    retriever: Retriever
    """The encoder that ``memory`` names."""
    _others: dict[str, Retriever] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """The memory layer's hidden states (1, T, E) of tokens (1, T)."""
        with self.autocast():
            return self.model.capture(ids, hidden=True)["hidden"]

    def row_retrieval(self, options: Mapping[str, Any], key: str) -> Retrieval:
        """As :meth:`retrieval`, for a row of a table whose rows share a bank.

        Raises:
            UserError: Also for a field that says what is stored.
        """
        fixed, unused = sorted(STORED & {*options}), sorted(UNUSED & {*options})
        require(not fixed, key, fixed, "other fields of the memory group", "set it for all: --memory.*")
        require(not unused, key, unused, "fields that change what is read here", "leave it out")
        return self.retrieval(options, key)

    def retrieval(self, options: Mapping[str, Any] | None = None, key: str = "evaluation.settings") -> Retrieval:
        """The memory settings at work, some of them changed.

        Args:
            options: Fields of the memory group, and of ``retriever`` in it.
            key: The setting they come from, for messages.

        Raises:
            UserError: For a field that is not there, or a value that cannot be used.
        """
        config = changed(self.memory, dict(options or {}), key)
        if config.retriever == self.memory.retriever:
            return Retrieval(config, self.retriever, self.tokenizer)
        name = repr(config.retriever)
        if name not in self._others:
            self._others[name] = load_retriever(config.retriever, self.model.config.hidden_size)
        return Retrieval(config, self._others[name], self.tokenizer)


UNUSED = {"distractors", "use"}
"""Fields that change nothing where nothing is trained and nothing counts."""
STORED = {"enabled", "chunk_size", "capacity", "policy", "policy_args", "half_life", "save_keys_values",
          "index", "dtype", "storage", "storage_folder"}  # fmt: skip
"""Fields a row's setting cannot change: what is stored is the same in every cell, and all of it is kept."""


TableRow = dict[str, Any]
"""A row of a table, by column."""


@dataclass
class Report:
    """What an evaluation found."""

    title: str
    notes: list[str]
    """How to read it, one sentence each."""
    tables: dict[str, list[TableRow]]
    """Name -> rows of a table to be read; all its rows have the same columns."""
    data: list[TableRow]
    """The same and more as numbers, for a file; all rows have the same columns."""
    figures: dict[str, Figure]


class Evaluation(ABC):
    """One kind of evaluation. ``run`` measures what is not in the record yet; ``report`` says what is in it."""

    name = "evaluation"
    keys: tuple[str, ...] = ()
    """The columns that tell one measurement from another."""
    reported: tuple[str, ...] = ()
    """Arguments that only the report depends on: what was measured with others is taken up."""
    whole: tuple[str, ...] = ()
    """Of these, the ones that tell apart what only one process can measure, such as documents: it is read once."""

    @property
    def reads_data(self) -> bool:
        """Whether the documents of the data group are used."""
        return False

    @abstractmethod
    def prepare(self, subject: Subject) -> None:
        """Open what is needed.

        Raises:
            UserError: If it cannot be measured; nothing has been measured then.
        """

    def unit_of(self, measurement: Measurement) -> tuple[Any, ...]:
        """What a measurement belongs to that is measured whole, by one part of several; by itself, if nothing is."""
        return tuple(measurement[name] for name in self.whole or self.keys)

    @property
    def remarks(self) -> list[str]:
        """What is to be said before anything is measured, once prepared."""
        return []

    @abstractmethod
    def planned(self) -> list[Measurement]:
        """The keys of all measurements there will be, once prepared; others in a record are of other texts."""

    @abstractmethod
    def run(self, subject: Subject, record: Record) -> Iterator[Measurement]:
        """Measure, and give each measurement as soon as it is made; those in the record are not made again."""

    @abstractmethod
    def report(self, measurements: list[Measurement]) -> Report:
        """Tables and figures of what was measured."""
