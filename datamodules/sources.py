"""Where text comes from: files on this machine or a web server, and shards of hub data sets.

Files are not read by ``datasets.load_dataset(..., streaming=True)``, which ends at the first row it cannot decode and
does not say which one that was. Here such a row is a record with its number and the reason, reading goes on after it,
and begins at any row, so that a run is resumed in the middle of a file.
"""

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .columnar import arrow_rows, parquet_rows
from .formats import (
    DELIMITERS,
    HEAD_BYTES,
    LONG_WINDOW,
    NotTextError,
    check_beginning,
    is_compressed,
    kind_of,
    printable,
)
from .network import file_system, not_there, read_with_retries, retry
from .records import Columns, Record, column_record, text_record

log = logging.getLogger("lightning_memlong")

UNPACKERS: dict[str, Callable[[Any], Any]] = {"xz": lzma.LZMAFile, "bz2": bz2.BZ2File}
VALIDATORS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "blob_id", "Last-Modified", "LastModified", "updated",
              "mtime")  # fmt: skip
"""What file systems call that by which one content is told from another."""


class FileShard:
    """One file: plain text, JSON, a table (.csv, .tsv), Arrow or parquet; all but the last may be compressed.

    Args:
        name: Path relative to the source; what documents are called by.
        url: Where it is: a path, or an address fsspec understands (http://, https://, hf://).
        columns: Which columns to read.
        retries: How often a network fault is answered by reading again, without any progress in between.
        timeout_s: How long a server may take to answer [s].
    """

    def __init__(self, name: str, url: str, columns: Columns, retries: int = 5, timeout_s: float = 60) -> None:
        self.name, self.url, self.columns, self.retries = printable(name), url, columns, retries
        self.timeout_s = timeout_s
        self.path = re.sub(r"[?#].*", "", url) if "://" in url else url
        self.kind, self.compression = kind_of(self.path)

    @property
    def is_text(self) -> bool:
        """Plain text, without rows of its own."""
        return self.kind is None

    def rows(self, start: int = 0, by_line: bool = False) -> Iterator[Record]:
        """Rows from number ``start`` on.

        Raises:
            UserError: If the file is not there, a column is unknown, or the network fails again and again.
        """

        def read(first: int) -> Iterator[Record]:
            if self.kind in ("parquet", "arrow"):
                yield from self._columnar(first)
            elif self.kind == "json":
                yield from self._json(first)
            elif self.kind is not None:
                yield from self._table(first, DELIMITERS[self.kind])
            else:
                yield from self._lines(first) if by_line else self._whole(first)

        yield from read_with_retries(read, start, self.url, self.retries)

    def identity(self, content: bool) -> str:
        """What changes with the file: a digest of its content, or its size and time.

        Of an address it is what the server says of the content (a date, a digest), if it says anything.

        Raises:
            UserError: If it is not there, or the network fails again and again.
        """
        try:
            if "://" in self.url:
                facts = retry(lambda: _remote_facts(self.url, content, self.timeout_s), self.url, self.retries)
            elif content:
                with open(self.url, "rb") as file:
                    facts = _digest(file)
            else:
                status = Path(self.url).stat()
                facts = f"{status.st_size} {status.st_mtime_ns}"
        except OSError as error:
            raise not_there(self.url, error) from error
        return f"{self.name} {facts}"

    def _whole(self, start: int) -> Iterator[Record]:
        if start == 0:
            with ExitStack() as stack:
                yield text_record(0, self._begin(stack).read())

    def _lines(self, start: int) -> Iterator[Record]:
        with ExitStack() as stack:
            for number, line in enumerate(self._begin(stack)):
                if number >= start:
                    yield text_record(number, line)

    def _json(self, start: int) -> Iterator[Record]:
        columns: tuple[str, str | None] | None = None
        with ExitStack() as stack:
            stream = self._begin(stack)
            array = _begins_array(stream)
            for number, line in enumerate(_members(stream) if array else stream):
                if not array and (not line.strip() or (number < start and columns is not None)):
                    continue
                try:
                    value = line if array else json.loads(line)
                    if not isinstance(value, dict):
                        raise ValueError(f"it holds a {type(value).__name__}, not an object with columns")
                except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                    if number >= start:
                        yield Record(number, problem=f"not a row of JSON ({error})")
                    continue
                columns = columns or self.columns.choose(list(value), self.url)  # the first row says what there is
                if number >= start:
                    yield column_record(number, value, *columns)

    def _table(self, start: int, delimiter: str) -> Iterator[Record]:
        # Not by pandas, as datasets reads tables: it takes the text 007 for a number and NA for nothing.
        csv.field_size_limit(sys.maxsize)  # a book is longer than the 131,072 characters that it allows otherwise
        with ExitStack() as stack:
            # What is no UTF-8 becomes surrogates, which spoil their own row only.
            lines = io.TextIOWrapper(self._begin(stack), "utf-8-sig", errors="surrogateescape", newline="")
            rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
            columns = self.columns.choose(list(rows.fieldnames or ()), self.url)
            for number, value in enumerate(rows):
                if number >= start and None in value:
                    yield Record(number, problem=f"it has more fields than the {len(rows.fieldnames or ())} columns")
                elif number >= start:
                    yield column_record(number, value, *columns)

    def _columnar(self, start: int) -> Iterator[Record]:
        with ExitStack() as stack:
            raw = self.open(stack, seek=True)
            if self.kind == "arrow":
                yield from arrow_rows(raw, self.columns, self.url, start)
                return
            try:
                file = pq.ParquetFile(raw, page_checksum_verification=True)
            except pa.ArrowInvalid:
                raw.seek(0)
                check_beginning(self.path, self.kind, raw.read(HEAD_BYTES))
                raise
            yield from parquet_rows(file, self.columns, self.url, start)

    def _begin(self, stack: ExitStack) -> Any:
        """Its bytes, once its beginning was found to be text."""
        stream = self.open(stack)
        try:
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        except OSError as error:
            if "too much memory" in str(error):  # pyarrow says it in words alone
                raise NotTextError(LONG_WINDOW) from error
            raise
        check_beginning(self.path, self.kind, head)
        return stream

    def open(self, stack: ExitStack, seek: bool = False) -> Any:
        """Its bytes, unpacked, for as long as a stack is open; ``seek``: they are read at any place."""
        if "://" in self.url:
            raw: Any = stack.enter_context(_remote(self.url, seek, stack, self.timeout_s))
        else:
            raw = stack.enter_context(open(self.url, "rb"))
        if self.compression is None:
            return raw
        if not is_compressed(self.compression, raw.peek(4)):
            return raw  # the server has unpacked it already
        if self.compression == "gzip":
            return gzip.GzipFile(fileobj=raw)  # of several members, or padded with zeros, too
        if self.compression in UNPACKERS:
            return UNPACKERS[self.compression](raw)
        # pyarrow notices a stream that was cut short; zstandard does not.
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), self.compression), 1 << 16)


def _begins_array(stream: Any) -> bool:
    return bool(stream.peek(HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["))


def _members(stream: Any) -> list[Any]:
    """Of one JSON array, which can only be read whole, as ``datasets`` does."""
    try:
        return list(json.loads(stream.read().decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise NotTextError(f"no whole JSON array ({error})") from error


def _digest(file: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def _remote_facts(url: str, content: bool, timeout_s: float) -> str:
    """What tells contents of an address apart; a length does not."""
    fs, path = file_system(url, timeout_s)
    info = fs.info(path)
    known = {key: str(info[key]) for key in VALIDATORS if info.get(key) is not None}
    if known:
        # What a cache is found by holds the whole address, a place in the text does not: signed ones change daily.
        return repr((url if content else "", info.get("size"), known))
    if not content:
        return repr((url, info.get("size")))
    with ExitStack() as stack:
        return _digest(_remote(url, False, stack, timeout_s))


def _remote(url: str, seek: bool, stack: ExitStack, timeout_s: float) -> Any:
    fs, path = file_system(url, timeout_s)
    if not url.startswith("http"):
        return io.BufferedReader(fs.open(path, "rb"), 1 << 16)
    if not seek:
        # One request, read as it comes.
        return io.BufferedReader(fs.open(path, "rb", block_size=0), 1 << 16)
    file = fs.open(path, "rb")
    try:
        file.seek(-1, io.SEEK_END)
        file.read(1)
        file.seek(0)
        return file
    except ValueError:
        file.close()
    # Parquet is read from its end, which this server does not offer: keep a copy while reading.
    log.info("%s: the server gives no parts of files; it is copied to a temporary file first", url)
    copy = stack.enter_context(tempfile.TemporaryFile())
    with fs.open(path, "rb", block_size=0) as body:
        shutil.copyfileobj(body, copy, 1 << 20)
    copy.seek(0)
    return copy


class HubShard:
    """One shard of a hub data set, streamed with the ``datasets`` library.

    Args:
        name: What documents are called by.
        dataset: A ``datasets.IterableDataset`` of this shard alone.
        columns: Which columns to read.
        known_by: What tells one state of the data set from another.
        retries: As for :class:`FileShard`.
    """

    def __init__(
        self, name: str, dataset: Any, columns: Columns, known_by: Callable[[], str], retries: int = 5
    ) -> None:
        self.name, self.dataset, self.columns, self.retries = name, dataset, columns, retries
        self._known_by = known_by

    def identity(self, content: bool) -> str:
        """What changes when the data set changes."""
        return f"{self.name} {self._known_by()}"

    def rows(self, start: int = 0, by_line: bool = False) -> Iterator[Record]:
        """Rows from number ``start`` on."""

        def read(first: int) -> Iterator[Record]:
            columns: tuple[str, str | None] | None = None
            for number, value in enumerate(self.dataset.skip(first) if first else self.dataset, first):
                columns = columns or self.columns.choose(list(value), self.name)
                yield column_record(number, value, *columns)

        yield from read_with_retries(read, start, self.name, self.retries)
