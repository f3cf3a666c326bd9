"""Measurements that are finished, in a file that an interrupted evaluation goes on with."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_memlong.errors import UserError

Measurement = dict[str, Any]
"""What was measured once, by column; a line of the file."""


class Record:
    """Measurements, one line of JSON each, appended as they are made.

    A line that a killed process left half-written is dropped, and measured again.

    Args:
        file: Where they are kept; made if it is not there.
        keys: The columns that tell one measurement from another.

    Raises:
        UserError: If the file is damaged.
    """

    def __init__(self, file: Path, keys: Iterable[str]) -> None:
        self.file, self.keys = file, tuple(keys)
        self.measurements: list[Measurement] = []
        if file.exists():
            self._read()
        self._known = {self._key(measurement) for measurement in self.measurements}
        self.found = len(self.measurements)

    def _read(self) -> None:
        text = self.file.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.file.write_text(whole)
        try:
            self.measurements = [json.loads(line) for line in whole.splitlines()]
            [self._key(measurement) for measurement in self.measurements]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file}: measurements of an earlier run cannot be read ({error}). Allowed: what an evaluation "
                "wrote. Fix: delete the file; they are made again."
            ) from error

    def _key(self, measurement: Measurement) -> tuple[Any, ...]:
        return tuple(measurement[name] for name in self.keys)

    def __contains__(self, measurement: Measurement) -> bool:
        return self._key(measurement) in self._known

    def of(self, planned: Iterable[Measurement]) -> list[Measurement]:
        """The measurements that are planned."""
        wanted = {self._key(measurement) for measurement in planned}
        return [measurement for measurement in self.measurements if self._key(measurement) in wanted]

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement."""
        if measurement in self:
            return
        with self.file.open("a") as out:
            out.write(json.dumps(measurement) + "\n")
        self.measurements.append(measurement)
        self._known.add(self._key(measurement))
