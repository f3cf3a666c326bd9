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
        beside: Files of other processes, which may still be writing: what they hold is known, and they are not written.
        elsewhere: Measurements that are made by others, and so not here, made or not.

    Raises:
        UserError: If a file is damaged.
    """

    def __init__(
        self, file: Path, keys: Iterable[str], beside: Iterable[Path] = (), elsewhere: Iterable[Measurement] = ()
    ) -> None:
        self.file, self.keys = file, tuple(keys)
        self.measurements: list[Measurement] = []
        self._known: set[tuple[Any, ...]] = set()
        for each in (file, *beside):
            if each.exists():
                self._take(self._read(each))
        self.found = len(self.measurements)
        self._elsewhere = {self._key(measurement) for measurement in elsewhere}

    def _read(self, file: Path) -> list[Measurement]:
        text = file.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text and file == self.file:
            file.write_text(whole)
        try:
            measurements = [json.loads(line) for line in whole.splitlines()]
            [self._key(measurement) for measurement in measurements]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: measurements of an earlier run cannot be read ({error}). Allowed: what an evaluation "
                "wrote. Fix: delete the file; they are made again."
            ) from error
        return measurements

    def _take(self, measurements: Iterable[Measurement]) -> None:
        """Know them; of two of the same, the first."""
        for measurement in measurements:
            if (key := self._key(measurement)) not in self._known:
                self._known.add(key)
                self.measurements.append(measurement)

    def _key(self, measurement: Measurement) -> tuple[Any, ...]:
        return tuple(measurement[name] for name in self.keys)

    def __contains__(self, measurement: Measurement) -> bool:
        key = self._key(measurement)
        return key in self._known or key in self._elsewhere

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
        self._take([measurement])
