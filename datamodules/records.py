"""What shards consist of: rows of text, or of columns one of which is the text."""

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

    def among(self, there: Sequence[str], where: str) -> tuple[str, str | None]:
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
class Row:
    """A row of a shard, or a place where none could be read."""

    number: int
    """Counted from 0."""
    text: str = ""
    book: str | None = None
    problem: str | None = None
    """Why it cannot be read."""


class Shard(Protocol):
    """A part of a source that is read from its beginning to its end."""

    name: str

    def rows(self, start: int = 0, by_line: bool = False) -> Iterator[Row]:
        """Rows from number ``start`` on; of a plain text file its lines, or the whole as one row."""

    def identity(self, content: bool) -> str:
        """What changes when the shard changes: its content if asked for, else what is known without reading it."""


def decoded(number: int, data: bytes) -> Row:
    """A row of plain text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Row(number, problem=f"not UTF-8 ({error})")
    return Row(number, problem="a binary file: it holds a zero byte") if "\x00" in text else Row(number, text)


def of_columns(number: int, value: dict[str, Any], text: str, book: str | None) -> Row:
    """A row of columns."""
    which = None if book is None or value.get(book) is None else str(value[book])
    missing = [name for name in (text, book) if name is not None and name not in value]
    if missing:
        return Row(number, "", which, f"it has no column {' and '.join(map(repr, missing))}")
    content = value[text]
    if not isinstance(content, str):
        return Row(number, "", which, f"column {text!r} holds {type(content).__name__}, not text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        return Row(number, "", which, f"not Unicode text ({error})")
    return Row(number, content, which)
