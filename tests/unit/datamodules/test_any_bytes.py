"""Files of any bytes, under any name: read, left out and counted, or told; never another error."""

import bz2
import gzip
import io
import json
import lzma
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import example, given, settings

from datamodules import PG19
from datamodules.resolve_source import resolve_source
from lightning_memlong.errors import UserError

ROWS = [{"text": "kan lor mis " * 9, "n": 1}, {"text": "tur rax sin " * 9, "n": 2}]


def _parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


def _zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", data)
    return out.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WHOLE = {
    ".txt": ROWS[0]["text"].encode(),  # type: ignore[attr-defined]
    ".jsonl": LINES,
    ".json": json.dumps(ROWS).encode(),
    ".csv": b"text,n\nkan lor,1\nmis tur,2\n",
    ".tsv": b"text\tn\nkan lor\t1\n",
    ".parquet": _parquet(),
    ".html": b"<html><p>kan</p></html>",
    ".pdf": b"%PDF-1.4 kan",
    "": b"kan lor",
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
    ".zip": _zipped,
}  # fmt: skip
contents = st.one_of(
    st.binary(max_size=200).map(lambda data: lambda whole: data),
    st.text(max_size=60).map(lambda text: lambda whole: text.encode("utf-8", "surrogatepass")),
    st.floats(0, 1).map(lambda place: lambda whole: whole[: int(place * len(whole))]),
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)).map(
        lambda change: lambda whole: _changed(whole, *change)
    ),
)


def _changed(whole: bytes, place: float, by: int) -> bytes:
    at = int(place * len(whole))
    return whole[:at] + bytes([whole[at] ^ by]) + whole[at + 1 :] if whole else whole


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from([*WHOLE]), st.sampled_from([*PACKED]), st.booleans(), contents, st.booleans())
@example(".jsonl", "", True, lambda whole: b'{"text": "\\ud800"}\n', True)
@example(".jsonl", "", True, lambda whole: b'{"text": null}\n[1]\n"x"\n', True)
@example(".txt", "", True, lambda whole: b"\x00" * 50, True)
def test_any_bytes(ending: str, packed: str, inside: bool, change: Callable[[bytes], bytes], named: bool) -> None:
    data = PACKED[packed](change(WHOLE[ending])) if inside else change(PACKED[packed](WHOLE[ending]))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        file = Path(folder) / f"document{ending}{packed}"
        file.write_bytes(data)
        given_path = str(file) if named else folder
        try:
            reading = PG19(path=given_path, split="all", chunk_size=16, window=32, on_bad_document="skip")
            source = resolve_source(reading.settings, reading)
            for shards in source.shards.values():
                for index in range(len(shards)):
                    for document in reading.documents(shards, index):
                        assert document.problem or document.text.encode() is not None
        except UserError as error:
            assert "Fix: " in str(error) and folder in str(error)
