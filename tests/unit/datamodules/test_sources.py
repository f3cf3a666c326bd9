"""Files, addresses and hub data sets: the same rows whatever the format, and every fault told by file and row."""

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from datamodules import network
from datamodules.files import find_files
from datamodules.hub import Hub, file_versions, hub_shards
from datamodules.records import Columns, Record
from datamodules.sources import FileShard
from lightning_memlong.errors import UserError
from tests.server import Server

TEXTS = [f"{number} " + "Zoë said ∀x " * (number % 7) + "\n" * (number % 3) for number in range(50)]
FORMATS = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.csv", "a.tsv.gz", "a.ndjson", "a.jsonlines.zst",
           "a.arrow", "feather.arrow")  # fmt: skip
COLUMNS = Columns("text", likely=("title",))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "FIRST_WAIT_S", 0.001)


def write(file: Path, texts: list[str] = TEXTS, column: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({column: text, "title": text[:1]}) + "\n" for text in texts).encode()
    if {".csv", ".tsv"} & set(file.suffixes):
        text = io.StringIO()
        rows = csv.writer(text, delimiter="\t" if ".tsv" in file.suffixes else ",")
        rows.writerows([(column, "title"), *((text, text[:1]) for text in texts)])
        lines = text.getvalue().encode()
    if file.suffix == ".parquet":
        pq.write_table(pa.table({column: texts, "title": [t[:1] for t in texts]}), file, row_group_size=7)
    elif file.suffix == ".arrow":
        table = pa.table({column: texts, "title": [t[:1] for t in texts], "unread": list(range(len(texts)))})
        make = pa.ipc.new_file if file.stem == "feather" else pa.ipc.new_stream
        with make(file, table.schema) as to:
            to.write_table(table, max_chunksize=7)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))  # two members, as pigz writes them
    elif file.suffix == ".zst":
        file.write_bytes(zstandard.compress(lines[:1000]) + zstandard.compress(lines[1000:]))
    else:
        file.write_bytes(lines)
    return file


def rows(url: object, start: int = 0, columns: Columns = COLUMNS, retries: int = 3, **more: bool) -> list[Record]:
    return list(FileShard("name", str(url), columns, retries).rows(start, **more))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_from_any_one_on(name: str, tmp_path: Path, server: Server) -> None:
    file = write(tmp_path / name)
    expected = [Record(i, text, text[:1]) for i, text in enumerate(TEXTS)]
    for place in (file, server.serve(tmp_path) + f"/{name}"):
        for start in (0, 1, 20, 49, 50):
            assert rows(place, start) == expected[start:]
    assert rows(file, columns=Columns("title"))[3] == Record(3, "3")


def test_plain_text_is_one_row_or_lines(tmp_path: Path) -> None:
    for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress), ("b", bytes)):
        (tmp_path / name).write_bytes(pack("á\n\nb\nc".encode()))
        assert rows(tmp_path / name) == [Record(0, "á\n\nb\nc")] and rows(tmp_path / name, 1) == []
        assert rows(tmp_path / name, 1, by_line=True) == [Record(1, "\n"), Record(2, "b\n"), Record(3, "c")]


def test_a_row_that_cannot_be_read_is_told_and_the_next_one_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"}).encode()
    bad = [b'{"text": "\xff"}', b'{"text": "cut', b"[1]", b'{"other": 1}', b'{"text": null}', b'{"text": "\\ud800"}']
    file.write_bytes(b"\n".join([good, *bad, good]))
    found = rows(file)
    assert [r.text for r in found if not r.problem] == ["good", "good"] and len(found) == 8
    for row, word in zip(
        found[1:-1], ("utf-8", "JSON", "list", "no column 'text'", "NoneType", "Unicode"), strict=True
    ):
        assert row.problem is not None and word in row.problem
    binary = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": binary}), tmp_path / "a.parquet")
    good_row, bad_row = rows(tmp_path / "a.parquet")
    assert good_row == Record(0, "ok") and bad_row.problem is not None and "UTF-8" in bad_row.problem
    (tmp_path / "a.txt").write_bytes(b"fine\nb\xffd\na\x00b\n")
    assert [bool(r.problem) for r in rows(tmp_path / "a.txt", by_line=True)] == [False, True, True]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt.gz"])
def test_a_file_that_was_cut_short_is_told(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, [os.urandom(3000).hex() for _ in range(50)])
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    found = rows(file)
    assert found[-1].problem is not None and "cannot be read" in found[-1].problem
    assert all(row.problem is None for row in found[:-1])
    assert len(found) > 5 or name in ("a.parquet", "a.txt.gz"), "what came before the cut is read"


def test_unknown_columns_are_told_with_those_there_are(tmp_path: Path) -> None:
    for name in FORMATS:
        file = write(tmp_path / name)
        with pytest.raises(UserError, match="data.text_column='body'.*Allowed: 'text', 'title'"):
            rows(file, columns=Columns("body"))
        with pytest.raises(UserError, match="data.book_column='isbn'.*Allowed: 'text', 'title'"):
            rows(file, columns=Columns("text", "isbn"))


# ---- the network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fault", ["500", "half", "reset"])
def test_reading_goes_on_after_faults(name: str, fault: str, tmp_path: Path, server: Server) -> None:
    write(tmp_path / name, TEXTS * 20)
    address = server.serve(tmp_path, faults=2, kind=fault) + f"/{name}"
    assert [row.text for row in rows(address)] == TEXTS * 20
    assert server.faults == 0, "the faults were met"


@pytest.mark.parametrize("fault", ["500", "half", "reset"])
def test_a_server_that_keeps_failing_is_told(fault: str, tmp_path: Path, server: Server) -> None:
    write(tmp_path / "a.jsonl")
    address = server.serve(tmp_path, faults=10**6, kind=fault) + "/a.jsonl"
    with pytest.raises(UserError, match="a.jsonl could not be read.*tried 4 times.*--data.retries"):
        rows(address)


def test_what_is_not_there_is_told_at_once(tmp_path: Path, server: Server) -> None:
    address = server.serve(tmp_path)
    with pytest.raises(UserError, match="a.jsonl cannot be read: not found"):
        rows(address + "/a.jsonl")
    with pytest.raises(UserError, match="a.jsonl cannot be read"):
        rows(tmp_path / "a.jsonl")
    assert server.requests <= 3, "no second try"


def test_a_server_that_refuses_is_told_with_its_answer(tmp_path: Path, server: Server) -> None:
    write(tmp_path / "a.jsonl")
    address = server.serve(tmp_path, faults=10**6, kind="403")
    for read in (lambda: rows(address + "/a.jsonl"), lambda: names(address + "/")):
        with pytest.raises(UserError, match="the server answers 403"):
            read()


def test_a_gz_that_the_server_has_unpacked_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(write(tmp_path / "plain.jsonl").read_bytes())
    assert [r.text for r in rows(tmp_path / "a.jsonl.gz")] == TEXTS


def test_parquet_is_read_in_parts_where_the_server_gives_them(tmp_path: Path, server: Server) -> None:
    texts = [os.urandom(5_000).hex() for _ in range(2_000)]
    file = write(tmp_path / "a.parquet", texts)
    pq.write_table(pa.table({"text": texts}), file, row_group_size=200, compression="none")
    address = server.serve(tmp_path, ranges=True) + "/a.parquet"
    assert [r.text for r in rows(address, 1_900)] == texts[1_900:]
    assert server.sent < file.stat().st_size * 0.75, "groups before the place are not fetched"


# ---- which files ------------------------------------------------------------------------------------------


def names(path: object, *endings: str) -> list[str]:
    return [shard.name for shard in find_files(str(path), endings or (".txt", ".jsonl"), COLUMNS, 1)]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, server: Server) -> None:
    for name in ("train/a.txt", "validation/b.txt"):
        write(tmp_path / name)
    address = server.serve(tmp_path)
    for where in (address, f"{address}/*/*.txt"):
        server.faults, server.kind = 1, "listing"
        assert names(where) == ["train/a.txt", "validation/b.txt"]
        server.faults = 10**6
        with pytest.raises(UserError, match="could not be read: .*reset.*tried 2 times"):
            names(where)


def test_files_folders_globs_and_addresses(tmp_path: Path, server: Server) -> None:
    for name in ("train/b.txt", "train/a.jsonl", "validation/c.txt", "d.bin"):
        write(tmp_path / name)
    address = server.serve(tmp_path)
    for root in (tmp_path, address):
        assert names(root) == ["train/a.jsonl", "train/b.txt", "validation/c.txt"]
        assert names(f"{root}/train/b.txt") == ["b.txt"]
        assert names(f"{root}/train/*.txt") == ["b.txt"]
        assert names(f"{root}/*/*.txt") == ["train/b.txt", "validation/c.txt"]
    assert names(tmp_path / "d.bin") == ["d.bin"], "a file that is named is read"
    assert [r.text for r in find_files(f"{address}/train", (".jsonl",), COLUMNS, 1)[0].rows()] == TEXTS
    assert names(f"{tmp_path}/t*") == ["train/a.jsonl", "train/b.txt"]
    (tmp_path / "x").mkdir()
    write(tmp_path / "x" / "a b#1.txt")
    assert names(tmp_path / "x") == names(f"{address}/x") == ["a b#1.txt"], "the same name on a disk and on a server"
    assert names(f"{address}/train/b.txt?sig=1*2") == ["b.txt"]
    for nothing in (tmp_path / "nowhere", f"{tmp_path}/*.tex", f"{address}/nowhere"):
        with pytest.raises(UserError, match="data.path"):
            names(nothing)
    with pytest.raises(UserError, match="holds no text.*md.*--data.extensions"):
        names(tmp_path, ".md")


# ---- the hub, as a folder laid out like a data set ----------------------------------------------------------


def test_a_hub_data_set_is_streamed(tmp_path: Path) -> None:
    for split, part in (("train", 0), ("train", 1), ("test", 0)):
        texts = [f"{split} {part} {text}" for text in TEXTS]
        write(tmp_path / "data" / f"{split}-0000{part}-of-00002.parquet", texts)
    hub = Hub(str(tmp_path))
    splits = hub.splits(0)
    assert set(splits) == {"train", "test"}
    shards = hub_shards(hub, "x/train", splits["train"], COLUMNS, 0)
    assert [s.name for s in shards] == ["x/train/0", "x/train/1"]
    assert [r.text for r in shards[1].rows(48)] == [f"train 1 {text}" for text in TEXTS[48:]]
    with pytest.raises(UserError, match="data.text_column='body'.*'text', 'title'"):
        list(hub_shards(hub, "x", splits["test"], Columns("body"), 0)[0].rows())
    before = shards[0].identity(True)
    assert before == hub_shards(hub, "x/train", splits["train"], COLUMNS, 0)[0].identity(True)
    os.utime(tmp_path / "data" / "train-00000-of-00002.parquet", (1, 1))
    assert before != hub_shards(hub, "x/train", splits["train"], COLUMNS, 0)[0].identity(True)


def test_datasets_still_tells_versions_of_files_apart(tmp_path: Path) -> None:
    """``file_versions`` reads ``builder.config.data_files[split].origin_metadata``, which is not documented."""
    from datasets import load_dataset_builder

    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.parquet")
    first, again = (file_versions(load_dataset_builder(str(tmp_path))) for _ in range(2))
    assert first == again and set(first) == {"train", "test"}
    for split, (files, versions) in first.items():
        assert [Path(file).name for file in files] == [f"{split}.parquet"]
        assert len(versions) == 1 and repr(versions) != repr([()]), "something is known of each file"
    os.utime(tmp_path / "data" / "train.parquet", (1, 1))
    changed = file_versions(load_dataset_builder(str(tmp_path)))
    assert changed["train"] != first["train"] and changed["test"] == first["test"]


def test_a_hub_data_set_with_a_script_is_refused_and_its_files_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "train" / "x_0.jsonl.gz")
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(UserError, match="only loads through a script.*--data.hub_files"):
        Hub(str(tmp_path)).splits(0)
    read = Hub(str(tmp_path), files={"train": "train/*.jsonl.gz"}).splits(0)
    assert [row["text"] for row in read["train"]] == TEXTS
    (tmp_path / "b.txt").write_text("one line\n\nanother")
    texts = [Hub(str(tmp_path), files={"train": "*.txt"}).splits(0, by_line=by_line) for by_line in (False, True)]
    assert [len(list(splits["train"])) for splits in texts] == [1, 3]
    with pytest.raises(UserError, match="data.hub_config='c' means nothing"):
        Hub(str(tmp_path), "c", files={"train": "*.txt"}).splits(0)
    with pytest.raises(UserError, match="data.hub_files.*no known format"):
        Hub(str(tmp_path), files={"train": "train/*.bin"}).splits(0)


def test_no_hub_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.hub_id='no/such' cannot be loaded.*--data.path"):
        Hub("no/such").splits(0)
