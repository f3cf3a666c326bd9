"""Measurements that are finished, in a file that an interrupted evaluation goes on with."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_memlong.errors import UserError

Row = dict[str, Any]


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
        self.rows: list[Row] = []
        if file.exists():
            self._read()
        self._known = {self._key(row) for row in self.rows}
        self.found = len(self.rows)

    def _read(self) -> None:
        text = self.file.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.file.write_text(whole)
        try:
            self.rows = [json.loads(line) for line in whole.splitlines()]
            [self._key(row) for row in self.rows]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file}: measurements of an earlier run cannot be read ({error}). Allowed: what an evaluation "
                "wrote. Fix: delete the file; they are made again."
            ) from error

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.keys)

    def __contains__(self, row: Row) -> bool:
        return self._key(row) in self._known

    def of(self, planned: Iterable[Row]) -> list[Row]:
        """The measurements that are planned."""
        wanted = {self._key(row) for row in planned}
        return [row for row in self.rows if self._key(row) in wanted]

    def add(self, row: Row) -> None:
        """Keep a measurement."""
        if row in self:
            return
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._known.add(self._key(row))
