"""Rows of parquet and Arrow files, from any one on; columns that are not asked for are not fetched or not unpacked."""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .records import Columns, Record, column_record

BATCH_BYTES = 8_000_000


def parquet_rows(file: pq.ParquetFile, columns: Columns, where: str, start: int) -> Iterator[Record]:
    """Rows from number ``start`` on.

    Args:
        file: Open.
        columns: Which to read.
        where: For messages.
        start: Groups before it are not even fetched.

    Raises:
        UserError: If it has no such column.
    """
    text, book = columns.choose(file.schema_arrow.names, where)
    first = 0
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        if first + facts.num_rows > start:
            size = max(1, BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size))
            batches = file.iter_batches(min(size, 65_536), row_groups=[group], columns=[c for c in (text, book) if c])
            yield from _rows(batches, text, book, first, start)
        first += facts.num_rows


def arrow_rows(raw: Any, columns: Columns, where: str, start: int) -> Iterator[Record]:
    """Rows of what ``datasets`` writes by ``save_to_disk``, and of Arrow (feather) files; as :func:`parquet_rows`.

    Args:
        raw: The file, which can be read at any place.
        columns: Which to read.
        where: For messages.
        start: The first row.

    Raises:
        UserError: If it has no such column.
    """
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    reader: Any = pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)
    text, book = columns.choose(reader.schema.names, where)
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
    yield from _rows((batch.select([c for c in (text, book) if c]) for batch in batches), text, book, 0, start)


def _rows(batches: Iterable[pa.RecordBatch], text: str, book: str | None, first: int, start: int) -> Iterator[Record]:
    """Rows of batches, of which the first begins with row ``first``."""
    for batch in batches:
        for i in range(max(0, start - first), batch.num_rows):
            yield _row(batch, i, first + i, text, book)
        first += batch.num_rows


def _row(batch: pa.RecordBatch, place: int, number: int, text: str, book: str | None) -> Record:
    try:
        value = {name: batch.column(name)[place].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return Record(number, problem=f"not UTF-8 ({error})")
    return column_record(number, value, text, book)
