"""What a file is: text, rows, or something that must not be taken for text."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from datamodules import PG19, BookCorpus, WikiText103
from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.errors import UserError
from tests.unit.datamodules.layouts import POINTER, opened, read_all, splits_of, text, tokens, write, write_all


def zipped() -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("a.txt", "kan los")
    return body.getvalue()


def tarred() -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return body.getvalue()


NOT_TEXT: dict[str, tuple[str, bytes, str]] = {
    "html by name": ("a.html", b"<p>kan los</p>", "HTML"),
    "html by content": ("a.txt", b"\n<!DOCTYPE HTML><html>kan los", "HTML"),
    "notebook": ("a.ipynb", b'{"cells": [], "nbformat": 4}', "a notebook"),
    "notebook by content": ("a.txt", b'{\n "cells": [\n ]}', "a notebook"),
    "rtf": ("a.txt", b"{\\rtf1 kan los}", "RTF"),
    "pdf": ("a.txt", b"%PDF-1.4 kan los", "PDF.*pdftotext"),
    "lfs text": ("a.txt", POINTER, "Git LFS pointer.*git lfs pull"),
    "lfs rows": ("a.jsonl", POINTER, "Git LFS pointer.*git lfs pull"),
    "lfs packed": ("a.jsonl.gz", POINTER, "Git LFS pointer.*git lfs pull"),
    "lfs table": ("a.csv", POINTER, "Git LFS pointer.*git lfs pull"),
    "lfs parquet": ("a.parquet", POINTER, "Git LFS pointer.*git lfs pull"),
    "annex": ("a.txt", b"/annex/objects/SHA256E-s1--00.txt\n", "git annex get"),
    "list of files": ("a.txt", b"train/1.txt\ntrain/2.txt\n", "a list of file names"),
    "zip": ("a.txt", zipped(), "zip archive.*unpack"),
    "tar": ("a.txt", tarred(), "tar archive.*unpack"),
    "gzip without a name": ("a.txt", gzip.compress(b"kan los"), "compressed by gzip.*ends in .gz"),
    "bzip2": ("a.txt", bz2.compress(b"kan los"), "bzip2.*ends in .bz2"),
    "xz": ("a.txt", lzma.compress(b"kan los"), "xz.*ends in .xz"),
    "array cut short": ("a.json", b'[\n{"text": "kan"},', "no whole JSON array"),
    "utf-16": ("a.txt", "kan los".encode("utf-16"), "UTF-16, not UTF-8.*iconv"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_what_is_no_text_is_refused_by_what_it_is(case: str, tmp_path: Path, tiny_backbone: Path) -> None:
    name, data, words = NOT_TEXT[case]
    (tmp_path / name).write_bytes(data)
    for kind in (PG19, WikiText103, BookCorpus):
        with pytest.raises(UserError, match=f"{name}.*cannot be used: (row 1: )?it is .*{words}"):
            read_all(tmp_path / name, tiny_backbone, kind=kind, min_document_tokens=1)
    good = write_all(tmp_path, ["b.txt"])
    found = read_all([str(tmp_path / name), str(tmp_path / "b.txt")], tiny_backbone, on_bad_document="skip")
    assert found == tokens(tiny_backbone, good["b.txt"])


def test_text_about_mark_up_and_files_is_text(tmp_path: Path, tiny_backbone: Path) -> None:
    texts = ["kan <html> los " * 9, "see kan.txt " * 9, "kan.txt los\n" * 9, "{ kan }" * 9, "% PDF kan " * 9]
    for i, content in enumerate(texts):
        write(tmp_path, f"{i}.txt", [content])
    assert read_all(tmp_path, tiny_backbone) == tokens(tiny_backbone, texts)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".xz", ".bz2"])
def test_arrays_and_lines_are_read_compressed_too(ending: str, tmp_path: Path, tiny_backbone: Path) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    rows = [{"text": text(i), "id": i} for i in range(3)]
    forms = {"a.json": json.dumps(rows, indent=1), "b.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    expected = tokens(tiny_backbone, [str(row["text"]) for row in rows])
    for name, form in {**forms, "c.json": json.dumps(rows)}.items():
        file = tmp_path / (name + ending)
        file.write_bytes(pack.get(ending, bytes)(form.encode("utf-8-sig" if name == "c.json" else "utf-8")))
        assert read_all(file, tiny_backbone) == expected, name
        cut = tmp_path / f"cut-{name}{ending}"
        cut.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(UserError, match=f"cut-{name}"):
            read_all(cut, tiny_backbone)
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(text(9).encode()))
    assert read_all(tmp_path / "d.txt.xz", tiny_backbone) == tokens(tiny_backbone, [text(9)])


def test_rows_of_an_array_that_are_none_are_told_by_number(tmp_path: Path, tiny_backbone: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": text(1)}, 7, {"text": None}, {"text": text(2)}]))
    with pytest.raises(UserError, match="a.json:2 .*not a row of JSON.*int"):
        read_all(tmp_path / "a.json", tiny_backbone)
    found = read_all(tmp_path / "a.json", tiny_backbone, on_bad_document="skip")
    assert found == tokens(tiny_backbone, [text(1), text(2)])


def test_tables_are_read_as_tables(tmp_path: Path, tiny_backbone: Path) -> None:
    long = text(3, 40_000)  # longer than a field may be by itself
    rows = [["id", "text"], ["1", text(1)], ["2", f'{text(2)}, "kan"\nlos'], ["3", long], ["4", "007 " * 20]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with (tmp_path / "b.TSV").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    expected = tokens(tiny_backbone, [row[1] for row in rows[1:]])
    for name in ("a.csv", "b.TSV"):
        assert read_all(tmp_path / name, tiny_backbone) == read_all(
            tmp_path, tiny_backbone, extensions=[name[1:].lower()]
        )
        assert read_all(tmp_path / name, tiny_backbone) == expected
    with (tmp_path / "a.csv").open("ab") as file:
        file.write(b'5,"\xff"\n6,a,b\n7\n')
        file.write(f"8,{text(8)}\n".encode())
    with pytest.raises(UserError, match="a.csv:5 .*not Unicode"):
        read_all(tmp_path / "a.csv", tiny_backbone)
    found = read_all(tmp_path / "a.csv", tiny_backbone, on_bad_document="skip")
    assert found == sorted([*expected, *tokens(tiny_backbone, [text(8)])])


def test_damaged_pages_of_parquet_are_told(tmp_path: Path, tiny_backbone: Path) -> None:
    file = tmp_path / "data" / "train.parquet"
    file.parent.mkdir()
    texts = [text(i, 200) for i in range(5)]
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"text": texts}), file, write_page_checksum=True, **options)
    assert read_all(file, tiny_backbone) == tokens(tiny_backbone, texts)
    data = file.read_bytes()
    place = data.index(texts[2].encode())
    file.write_bytes(data[:place] + b"X" * 50 + data[place + 50 :])
    for path, hub in ((file, None), (None, str(tmp_path))):
        with pytest.raises(UserError, match="cannot be read.*CRC"):
            read_all(path, tiny_backbone, hub_id=hub)


def test_a_byte_order_mark_is_no_text(tmp_path: Path, byte_backbone: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.csv"):
        content = {"a.txt": "x" * 40, "a.jsonl": json.dumps({"text": "x" * 40}), "a.csv": f"text\n{'x' * 40}"}[name]
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        for kind in (PG19, WikiText103, BookCorpus):
            if kind is PG19 or name == "a.txt":
                (found,) = read_all(tmp_path / name, byte_backbone, kind=kind)
                assert found[:40] == tokens(byte_backbone, ["x" * 40])[0] and len(found) <= 41


@pytest.mark.parametrize("cache", [True, False])
def test_what_is_spelled_like_a_control_token_is_text_unless_asked_otherwise(
    cache: bool, tmp_path: Path, byte_backbone: Path
) -> None:
    content = f"{'x' * 40}<pad>{'y' * 40}"
    write(tmp_path, "train/a.txt", [f"{content}."])
    write(tmp_path, "valid/b.txt", [content])
    tokenizer = load_tokenizer(str(byte_backbone))
    literal = tokenizer([content], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
    tokenizer.backend_tokenizer.encode_special_tokens = False  # which the line before has left set
    (special,) = tokens(byte_backbone, [content])
    assert 0 in special and 0 not in literal and len(literal) == 85
    digests = set()
    for control, expected in ((False, literal), (True, special), (False, literal)):
        data = opened(tmp_path, byte_backbone, cache=cache, control_tokens=control, window=32, chunk_size=16)
        assert splits_of(data)["validation"] == [tuple(expected)]
        assert tokenizer("<pad>")["input_ids"] == [0], "the tokenizer is as it was"
        digests.add(data.streams["train"].digest())
        position = {"rows": [[0, 0, 32]]}
        if not cache:
            (windows,) = data.streams["validation"].replay_windows(position)
            assert windows[0].tolist() == list(expected)[:32]
    assert len(digests) == 2, "a run does not go on with the other"


@pytest.mark.parametrize("cache", [True, False])
def test_what_datasets_saves_to_disk_is_read(cache: bool, tmp_path: Path, tiny_backbone: Path) -> None:
    written = {part: [text(i), text(i + 1)] for i, part in ((0, "train"), (2, "validation"), (4, "test"))}
    made = {part: datasets.Dataset.from_dict({"text": texts}) for part, texts in written.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path, num_shards={"train": 2, "validation": 1, "test": 1})
    found = splits_of(opened(tmp_path, tiny_backbone, cache=cache), "fit", "test")
    assert found == {part: tokens(tiny_backbone, texts) for part, texts in written.items()}


def test_a_damaged_arrow_file_is_told(tmp_path: Path, tiny_backbone: Path) -> None:
    datasets.Dataset.from_dict({"text": [text(0), text(1)]}).save_to_disk(tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(UserError, match="arrow.*cannot be used"):
        read_all(tmp_path, tiny_backbone)
