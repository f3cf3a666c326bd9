"""What is read: shards, the records in them, and the documents that are made of these."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_memlong.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Which columns of a row are read."""

    text: str
    """The one that holds the text."""
    book: str | None = None
    """One whose value says which book a row belongs to."""
    likely: tuple[str, ...] = ()
    """Names such a column may have, where none was given."""

    def choose(self, there: Sequence[str], where: str) -> tuple[str, str | None]:
        """The text column and the book column (if any), of those that are there.

        Raises:
            UserError: If one that was asked for is not.
        """
        for option, column in (("text_column", self.text), ("book_column", self.book)):
            if column is not None and column not in there:
                raise UserError(
                    f"data.{option}={column!r}: {where} has no such column. Allowed: "
                    f"{', '.join(map(repr, there))}. Fix: --data.{option} with one of these."
                )
        return self.text, self.book or next((name for name in self.likely if name in there), None)


@dataclass(frozen=True)
class Record:
    """What one row of a shard holds, or why it could not be read."""

    number: int
    """Counted from 0."""
    text: str = ""
    book: str | None = None
    problem: str | None = None
    """Why it cannot be read."""


@dataclass(frozen=True)
class Document:
    """A text that has not been read into tokens yet."""

    id: str
    """Stable name: a path relative to the source, and the row where it begins if the file has rows."""
    text: str
    place: tuple[int, int] = (0, 0)
    """Number of its shard, and of its first row."""
    problem: str | None = None
    """Why it cannot be used."""

    def digest(self) -> str:
        """What tells its text from others; of one that cannot be read, its name."""
        return hashlib.blake2b((self.text if self.problem is None else self.id).encode(), digest_size=16).hexdigest()


class Shard(Protocol):
    """A part of a source that is read from its beginning to its end."""

    name: str

    def rows(self, start: int = 0, by_line: bool = False) -> Iterator[Record]:
        """Rows from number ``start`` on; of a plain text file its lines, or the whole as one row."""

    def identity(self, content: bool) -> str:
        """What changes when the shard changes: its content if asked for, else what is known without reading it."""


def text_record(number: int, data: bytes) -> Record:
    """The record of a line or file of plain text; a byte-order mark at its beginning is no part of it."""
    try:
        text = data.decode("utf-8-sig" if number == 0 else "utf-8")
    except UnicodeDecodeError as error:
        return Record(number, problem=f"not UTF-8 ({error})")
    return Record(number, problem="a binary file: it holds a zero byte") if "\x00" in text else Record(number, text)


def column_record(number: int, value: dict[str, Any], text: str, book: str | None) -> Record:
    """The record of a row that has columns."""
    which = None if book is None or value.get(book) is None else str(value[book])
    missing = [name for name in (text, book) if name is not None and name not in value]
    if missing:
        return Record(number, "", which, f"it has no column {' and '.join(map(repr, missing))}")
    content = value[text]
    if not isinstance(content, str):
        return Record(number, "", which, f"column {text!r} holds {type(content).__name__}, not text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        return Record(number, "", which, f"not Unicode text ({error})")
    return Record(number, content, which)
