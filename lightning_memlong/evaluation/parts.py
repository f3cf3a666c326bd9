"""An evaluation in parts: each measures some of the documents, and writes a file of its own beside the others'."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_memlong.config import require
from lightning_memlong.evaluation.base import Evaluation
from lightning_memlong.evaluation.record import Measurement, Record


@dataclass(frozen=True)
class Part:
    """One of several parts of an evaluation."""

    number: int
    """From 1 on."""
    of: int

    @classmethod
    def named(cls, text: str) -> "Part":
        """The part that ``2/8`` names.

        Raises:
            UserError: If it names none.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        number, of = map(int, found.groups()) if found else (0, 0)
        require(1 <= number <= of, "part", text, "N/M, where N is from 1 to M, such as 2/8", "correct it")
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"

    def takes(self, place: int) -> bool:
        """Whether it measures the document, or whatever is measured whole, that comes at a place, from 0 on."""
        return place % self.of == self.number - 1


def units_of(evaluation: Evaluation) -> dict[tuple[object, ...], int]:
    """What parts share out, each with its place: documents, or what else an evaluation measures whole."""
    return {unit: place for place, unit in enumerate(dict.fromkeys(map(evaluation.unit_of, evaluation.planned())))}


def record_files(folder: Path, evaluation: Evaluation, identity: str) -> list[Path]:
    """Where earlier runs, of all or of a part, have kept what they measured."""
    begin = f"{evaluation.name}-{identity}"
    return [*folder.glob(f"{begin}.jsonl"), *sorted(folder.glob(f"{begin}.part-*.jsonl"))]


def open_record(folder: Path, evaluation: Evaluation, identity: str, part: Part | None = None) -> Record:
    """The record of an evaluation that is prepared: it knows what all parts have measured.

    Args:
        folder: The run's.
        evaluation: What is measured.
        identity: Of its settings.
        part: What is measured here; None: all that is left.

    Raises:
        UserError: If a file is damaged.
    """
    begin = f"{evaluation.name}-{identity}"
    file = folder / (f"{begin}.jsonl" if part is None else f"{begin}.part-{part}.jsonl")
    beside = [other for other in record_files(folder, evaluation, identity) if other != file]
    return Record(file, evaluation.keys, beside, [] if part is None else _of_others(evaluation, part))


def _of_others(evaluation: Evaluation, part: Part) -> Iterable[Measurement]:
    places = units_of(evaluation)
    return [m for m in evaluation.planned() if not part.takes(places[evaluation.unit_of(m)])]
