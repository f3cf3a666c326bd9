"""What a file is, by its name and by how it begins: text, rows, or something that must not be taken for text."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "bz2": b"BZh"}
ROWS = {".jsonl": "json", ".ndjson": "json", ".jsonlines": "json", ".json": "json", ".parquet": "parquet",
        ".arrow": "arrow", ".csv": "csv", ".tsv": "tsv"}  # fmt: skip
DELIMITERS = {"csv": ",", "tsv": "\t"}
MARKUP = {".html": "HTML", ".htm": "HTML", ".xhtml": "HTML", ".ipynb": "a notebook", ".rtf": "RTF", ".pdf": "PDF",
          ".doc": "a Word file", ".docx": "a Word file", ".odt": "an OpenDocument file", ".epub": "EPUB"}  # fmt: skip
UNPACK = "unpack it, or read it as .gz, .zst, .xz or .bz2"
LONG_WINDOW = ("compressed by zstd --long, which looks further back than is unpacked here (128 MB): "
               "zstd -d --long=31 -c FILE | zstd -o NEW")  # fmt: skip
BEGINNINGS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the text: run git lfs pull",
    b"/annex/objects/": "a git-annex pointer, not the text: run git annex get",
    b"%PDF-": "PDF, not text: convert it, for instance by pdftotext",
    b"{\\rtf": "RTF, not text: convert it, for instance by pandoc",
    b"PK\x03\x04": f"a zip archive (or a file made as one, such as .docx or .epub), not text: {UNPACK}",
    b"\xfd7zXZ\x00": "compressed by xz: give it a name that ends in .xz",
    b"BZh": "compressed by bzip2: give it a name that ends in .bz2",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive: {UNPACK}",
    b"\x1f\x8b": "compressed by gzip: give it a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: give it a name that ends in .zst",
    b"PAR1": "parquet: give it a name that ends in .parquet",
    b"ARROW1": "an Arrow file: give it a name that ends in .arrow",
    b"\xff\xff\xff\xff": "an Arrow stream: give it a name that ends in .arrow",
    b"\xff\xfe": "UTF-16, not UTF-8: convert it by iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "UTF-16, not UTF-8: convert it by iconv -f utf-16 -t utf-8",
    b"SQLite format 3": "a data base, not text",
}
FILE_NAME = re.compile(rb"[^\s{}<>]*[\w)\]]\.(txt|jsonl?|ndjson|csv|tsv|parquet|tex|md|html?|pdf|gz|zst)", re.I)
HEAD_BYTES = 4096


class NotTextError(ValueError):
    """A file is something else than text or rows; the message says what, and what to do."""


def printable(name: str) -> str:
    """A name of a file as it can be printed and digested, also where it is no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def as_endings(extensions: Iterable[str]) -> tuple[str, ...]:
    """Endings as names are compared with: .TXT, *.txt and txt mean .txt."""
    return tuple(f".{one.lower().lstrip('*').removeprefix('.')}" for one in extensions)


def is_compressed(compression: str, head: bytes) -> bool:
    """Whether a file begins as one that is compressed; ``pzstd`` begins with a frame that is to be skipped."""
    return head.startswith(MAGIC[compression]) or (compression == "zstd" and head[1:4] == b"\x2a\x4d\x18")


def kind_of(name: str) -> tuple[str | None, str | None]:
    """Which rows a file of this name has (None: it is plain text), and what it is compressed by."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = COMPRESSION.get(suffixes[-1]) if suffixes else None
    kinds = suffixes[:-1] if compression else suffixes
    return ROWS.get(kinds[-1]) if kinds else None, compression


def check_beginning(name: str, kind: str | None, head: bytes) -> None:
    """Look at how a file begins, once it is unpacked.

    Args:
        name: Its name.
        kind: Which rows it should have; None: plain text.
        head: Its first bytes, up to ``HEAD_BYTES``.

    Raises:
        NotTextError: If it is neither text nor such rows.
    """
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning) and not (kind == "parquet" and beginning == b"PAR1"):
            raise NotTextError(what)
    if head[257:262] == b"ustar":
        raise NotTextError(f"a tar archive, not text: {UNPACK}")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if kind is None:
        _check_text(name, start, whole=len(head) < HEAD_BYTES)


def _check_text(name: str, start: bytes, whole: bool) -> None:
    markup = next((what for ending, what in MARKUP.items() if name.lower().endswith(ending)), None)
    if start[:14].lower().startswith((b"<!doctype html", b"<html")):
        markup = "HTML"
    if start.startswith(b"{") and re.search(rb'"nbformat"|^\{\s*"cells"\s*:\s*\[', start):
        markup = "a notebook"
    if markup:
        raise NotTextError(f"{markup}, mark-up rather than text: convert it, for instance by pandoc")
    lines = start.splitlines() if whole else start.splitlines()[:-1]
    if lines and all(FILE_NAME.fullmatch(line.strip()) for line in lines if line.strip()):
        raise NotTextError("a list of file names, not text: give the files, or their folder, as --data.path")
