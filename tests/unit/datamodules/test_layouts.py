"""Text as people have it: each layout is written, read, and compared document by document with what was written."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import socket
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from datamodules import PG19, BookCorpus, DocumentDataModule, WikiText103
from datamodules.sources import FileShard
from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.errors import UserError
from lightning_memlong.text import Windows, WindowSpec
from tests.conftest import WORDS
from tests.server import Server

Written = dict[str, list[str]]
"""Of each file, its documents."""


def text(seed: int, words: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(root: Path, name: str, texts: list[str]) -> None:
    """A file in the format its name says."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    plain, _, packed = name.lower().rpartition(".") if name.endswith((".gz", ".zst")) else (name.lower(), "", "")
    if plain.endswith((".jsonl", ".ndjson", ".jsonlines")):
        data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    elif plain.endswith(".parquet"):
        return pq.write_table(pa.table({"text": texts}), file)
    else:
        data = "".join(texts).encode()
    file.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(packed, bytes)(data))


def write_all(root: Path, names: list[str], rows: int = 3) -> Written:
    """Files of different documents: one of a text file, else a few rows."""
    written = {}
    for i, name in enumerate(names):
        count = rows if any(f".{end}" in name.lower() for end in ("jsonl", "parquet", "ndjson")) else 1
        written[name] = [text(100 * i + row) for row in range(count)]
        write(root, name, written[name])
    return written


def opened(path: object, backbone: Path, **more: Any) -> DocumentDataModule:
    place = str(path) if isinstance(path, Path) else path
    base: dict[str, Any] = {"path": place, "tokenizer": str(backbone), "chunk_size": 16, "window": 32, "num_workers": 0}
    base |= {"cache": True, "shuffle": False} | more
    return more.get("kind", PG19)(**{key: value for key, value in base.items() if key != "kind"})


def splits_of(data: DocumentDataModule, *stages: str) -> dict[str, list[tuple[int, ...]]]:
    """Of each split, the tokens of its documents, sorted."""
    for stage in stages or ("fit",):
        data.setup(stage)
    return {part: sorted(tuple(t.tolist()) for _, t in data.whole_documents(part)) for part in data.streams}


def tokens(backbone: Path, texts: list[str]) -> list[tuple[int, ...]]:
    return sorted(tuple(ids) for ids in load_tokenizer(str(backbone))(texts, add_special_tokens=False)["input_ids"])


# ---- splits -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, list[str]]] = {
    "PG-19 as in its bucket": {
        "train": ["deepmind-gutenberg/train/1.txt", "deepmind-gutenberg/train/2.txt"],
        "validation": ["deepmind-gutenberg/validation/3.txt"],
        "test": ["deepmind-gutenberg/test/4.txt"],
        "": ["note.txt"],
    },
    "Proof-Pile-2": {
        "train": ["arxiv/train/a.jsonl.zst", "algebraic-stack/train/b.jsonl.zst", "web/train/c.jsonl"],
        "validation": ["arxiv/validation/a.jsonl.zst", "algebraic-stack/validation/b.jsonl.zst"],
        "test": ["arxiv/test/a.jsonl.zst"],
    },
    "the Pile": {
        "train": ["train/00.jsonl.zst", "train/01.jsonl.zst"],
        "validation": ["val.jsonl.zst"],
        "test": ["test.jsonl.zst"],
    },
    "capitals": {"train": ["Train/a.txt"], "validation": ["Validation/b.txt"], "test": ["TEST.txt"]},
    "aliases": {"train": ["training/a.txt"], "validation": ["eval/b.txt"]},
    "dev and eval": {"train": ["trainING_1.txt"], "validation": ["dev.txt"], "test": ["Eval-0.txt"]},
    "eval and test": {"train": ["train-2.txt"], "validation": ["evaluation.txt"], "test": ["testing/a.txt"]},
    "a hub clone": {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "validation": ["data/validation-00000-of-00001.parquet"],
        "test": ["data/test-00000-of-00001.parquet"],
        "": ["readme.txt", "docs/one.txt", "docs/two.txt", "docs/three.txt"],
    },
    "names that hold more": {
        "train": ["wiki.train.txt", "wiki.Train.part2.txt"],
        "validation": ["wiki.valid.txt"],
        "": ["licence.txt"],
    },
    "folders of mixed depth": {"train": ["x/train/a/b/1.txt", "x/train/2.txt"], "validation": ["x/valid/a/1.txt"]},
    "languages": {"train": ["en/train.jsonl", "de/train.jsonl"], "validation": ["en/dev.jsonl", "de/dev.jsonl"]},
    "no training": {"validation": ["validation.jsonl"], "test": ["test.jsonl"]},
    "plain names beside longer ones": {
        "train": ["books-train.txt"],
        "validation": ["val.txt"],
        "test": ["test.txt"],
    },
    "in doubt": {"train": ["train.txt"], "validation": ["val.txt"], "": ["train_test_mix.txt"]},
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_what_names_say(
    layout: str, cache: bool, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = LAYOUTS[layout]
    written = write_all(tmp_path, [name for names in files.values() for name in names])
    stages = [
        stage for stage, part in (("fit", "train"), ("validate", "validation"), ("test", "test")) if part in files
    ]
    found = splits_of(opened(tmp_path, tiny_backbone, cache=cache), *stages)
    told = capsys.readouterr().out
    assert found == {
        part: tokens(tiny_backbone, [t for name in names for t in written[name]])
        for part, names in files.items()
        if part
    }
    if "" in files:
        assert (
            f"{len(files[''])} ({', '.join(sorted(files['']))}) of {tmp_path} are in no split and are not read" in told
        )


UNUSED: dict[str, list[str]] = {
    "train alone": ["train.jsonl"],
    "shards of train alone": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    "a chunk of SlimPajama": ["train/chunk1/example_train_0.jsonl.zst", "train/chunk1/example_train_1.jsonl.zst"],
    "one book about a train": [*(f"{n}.txt" for n in range(8)), "the-train.txt", "on-test.txt"],
    "code": ["train.md", "test.md", *(f"src/{n}.txt" for n in range(8))],
}


@pytest.mark.parametrize("layout", UNUSED)
def test_names_of_splits_that_are_not_used_are_told(
    layout: str, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_all(tmp_path, UNUSED[layout], rows=12)
    for cache in (True, False):
        endings = [".txt", ".md", ".jsonl", ".jsonl.zst", ".parquet"]
        data = opened(tmp_path, tiny_backbone, cache=cache, extensions=endings,
                      validation_fraction=0.25)  # fmt: skip
        found = splits_of(data, "fit", "test")
        told = capsys.readouterr().out
        assert told.count("named like splits and not used as such") == 1
        assert sorted(sum(found.values(), [])) == tokens(tiny_backbone, sum(written.values(), []))
    assert not set(found["train"]) & (set(found["validation"]) | set(found["test"]))


def test_asking_for_folders_takes_names_however_few(tmp_path: Path, tiny_backbone: Path) -> None:
    written = write_all(tmp_path, [*(f"{n}.txt" for n in range(8)), "my-train.txt", "my-test.txt"])
    data = opened(tmp_path, tiny_backbone, split="folders")
    assert splits_of(data, "test") == {"test": tokens(tiny_backbone, written["my-test.txt"])}


def test_names_within_a_path_of_a_split_are_told(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path, ["all/train/a.txt", "all/test/b.txt", "held.txt"])
    path = {"train": str(tmp_path / "all"), "validation": str(tmp_path / "held.txt")}
    splits_of(opened(path, tiny_backbone))
    assert "1 (test/b.txt): named like other splits and read as train" in capsys.readouterr().out
    splits_of(opened(path, tiny_backbone, split="hash", validation_fraction=0.4))
    assert "named like splits and not used as such" in capsys.readouterr().out


def test_a_missing_split_is_told_before_any_is_tokenised(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path, ["train/a.txt", "test/b.txt"])
    with pytest.raises(UserError, match="no validation split. Allowed: train, test"):
        splits_of(opened(tmp_path, tiny_backbone))
    assert "tokens" not in capsys.readouterr().out


def test_splits_of_a_hub_data_set_have_aliases_too(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, written = ["configs:", "- config_name: default", "  data_files:"], {}
    for split in ("train", "dev", "odd"):
        written |= write_all(tmp_path, [f"d/{split}x.parquet"])
        lines.append(f"  - split: {split}\n    path: d/{split}x.parquet")
    (tmp_path / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    found = splits_of(opened(None, tiny_backbone, hub_id=str(tmp_path), cache=False))
    assert found == {
        "train": tokens(tiny_backbone, written["d/trainx.parquet"]),
        "validation": tokens(tiny_backbone, written["d/devx.parquet"]),
    }
    assert "not read: 1 (odd)" in capsys.readouterr().out


def test_every_run_says_how_much_is_in_each_split(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path, ["train/a.txt", "train/b.txt", "valid/c.txt"])
    splits_of(opened(tmp_path, tiny_backbone))
    told = capsys.readouterr().out
    assert "documents: train 2 (60 tokens)" in told and "documents: validation 1 (30 tokens)" in told
    live = opened(tmp_path, tiny_backbone, cache=False)
    live.setup("fit")
    for loader in (live.train_dataloader(), live.val_dataloader()):
        list(loader)
    live.teardown("fit")
    told = capsys.readouterr().out
    assert "train: 2 documents of 60 tokens in an epoch" in told and "validation: 1 documents of 30 tokens" in told


# ---- which text a cache or a checkpoint is of ----------------------------------------------------------------


@pytest.mark.parametrize("silent", [True, False])
def test_the_cache_takes_no_text_for_another(silent: bool, tmp_path: Path, tiny_backbone: Path, server: Server) -> None:
    bodies: dict[str, bytes] = {}

    texts = {
        "/data.txt?v=1": "kan los",
        "/data.txt?v=2": "los kan",
        "/en/data.txt": "kan kan",
        "/de/data.txt": "los los",
    }
    bodies |= {at: (t + " ").encode() * 20 for at, t in texts.items()}
    for at in ("/en/data.txt", "/de/data.txt"):
        write(tmp_path, at[1:], [bodies[at].decode()])
        os.utime(tmp_path / at[1:], (1, 1))  # the same date too
    root = server.serve_bodies(bodies) if silent else server.serve(tmp_path)
    for at in texts if silent else ("/en/data.txt", "/de/data.txt"):
        data = opened(root + at, tiny_backbone, split="all")
        assert splits_of(data, "validate")["validation"] == tokens(tiny_backbone, [bodies[at].decode()]), at
    if silent:
        bodies["/en/data.txt"] = b"los kan " * 20  # as long, and nothing says that it has changed
        data = opened(f"{root}/en/data.txt", tiny_backbone, split="all")
        assert splits_of(data, "validate")["validation"] == tokens(tiny_backbone, ["los kan " * 20])


def test_a_text_that_changes_while_it_is_read_leaves_no_cache(
    tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = "kan los " * 20, "los kan " * 20
    write(tmp_path, "a.txt", [first])
    rows = FileShard.rows

    def changed(shard: FileShard, *args: Any, **more: Any) -> Any:
        write(tmp_path, "a.txt", [second])  # after its digest was made
        return rows(shard, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(FileShard, "rows", changed)
        with pytest.raises(UserError, match=r"1 \(a.txt\).*changed while being read"):
            splits_of(opened(tmp_path, tiny_backbone, split="all"), "validate")
    for content in (first, second):
        write(tmp_path, "a.txt", [content])
        found = splits_of(opened(tmp_path, tiny_backbone, split="all"), "validate")
        assert found["validation"] == tokens(tiny_backbone, [content])


def test_an_edit_of_equal_size_is_another_text_while_streaming(tmp_path: Path, tiny_backbone: Path) -> None:
    def digest() -> str:
        data = opened(tmp_path, tiny_backbone, cache=False)
        data.setup("fit")
        return data.streams["train"].digest()

    for name in ("train/a.txt", "valid/b.txt"):
        write(tmp_path, name, ["kan los " * 20])
    before = digest()
    assert digest() == before
    write(tmp_path, "train/a.txt", ["los kan " * 20])
    assert digest() != before


@pytest.mark.parametrize("text_then", ["kan " * 40, "", None])
def test_a_place_past_the_end_of_a_text_is_an_error(text_then: str | None, tmp_path: Path, tiny_backbone: Path) -> None:
    for name in ("train/a.txt", "valid/b.txt"):
        write(tmp_path, name, ["kan los " * 100])
    data = opened(tmp_path, tiny_backbone, cache=False)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    for _ in range(4):
        next(batches)
    position = data.streams["train"].position(0, 3)
    if text_then is None:
        (tmp_path / "train/a.txt").write_bytes(b"\xff" * 40)
    else:
        write(tmp_path, "train/a.txt", [text_then])
    again = opened(tmp_path, tiny_backbone, cache=False)
    again.setup("fit")
    again.streams["train"].resume(position)
    with pytest.raises(UserError, match="train/a.txt.*tokens, and the checkpoint is at 96 of it.*--ckpt_path"):
        list(again.train_dataloader())


def test_an_empty_window_reaches_no_loss() -> None:
    with pytest.raises(AssertionError, match="empty"):
        Windows(8, 8, 1).batch([WindowSpec(0, 8, np.zeros(0, np.int32))])


# ---- links, names, and the same text twice ------------------------------------------------------------------


def link(at: Path, target: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(target, target_is_directory=target.is_dir())


def read_all(path: object, backbone: Path, **more: Any) -> list[tuple[int, ...]]:
    return splits_of(opened(path, backbone, split="all", **more), "validate")["validation"]


def test_links_are_followed_and_what_is_passed_over_is_told_once(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, apart = tmp_path / "root", tmp_path / "apart"
    written = write_all(root, ["1.txt", "in/2.txt", "z/3.jsonl"]) | write_all(apart, ["4.txt", "deep/5.txt"])
    link(root / "linked", apart)
    link(root / "linked.txt", apart / "4.txt")  # twice
    link(apart / "back", root)  # round in a circle
    link(root / "a", root / "in")  # before its target in the order of names
    link(root / "1-again.txt", root / "1.txt")
    link(root / "annexed.txt", tmp_path / "nowhere")
    write_all(root, [".hidden.txt", ".git/config.txt", "table.bin", "picture.png"])
    expected = tokens(tiny_backbone, sum(written.values(), []))
    assert read_all(root, tiny_backbone) == expected
    told = capsys.readouterr().out
    assert told.count("not read of") == 1
    for words in ("1 (annexed.txt) links to nothing", "2 (.git/, .hidden.txt) hidden", "2 of other endings",
                  "4 (a/, linked/back/, 1-again.txt, linked/4.txt) the same as others"):  # fmt: skip
        assert words in told, words
    link(tmp_path / "whole", root)
    assert read_all(tmp_path / "whole", tiny_backbone) == expected
    with pytest.raises(UserError, match="annexed.txt' is a link to nothing"):
        read_all(root / "annexed.txt", tiny_backbone)
    with pytest.raises(UserError, match=r"holds no text \(not read: 1 .x.txt. links to nothing"):
        link(tmp_path / "annex" / "x.txt", tmp_path / "nowhere")
        read_all(tmp_path / "annex", tiny_backbone)


@pytest.mark.parametrize("name", ["books [1900]", "what?", "a*b", "[train]"])
def test_a_folder_that_is_there_is_no_glob(name: str, tmp_path: Path, tiny_backbone: Path, server: Server) -> None:
    written = write_all(tmp_path / name, ["1.txt", "sub/2.txt"])
    write_all(tmp_path / name, ["metadata.bin"])
    expected = tokens(tiny_backbone, sum(written.values(), []))
    assert read_all(tmp_path / name, tiny_backbone) == expected
    assert read_all(tmp_path / name / "1.txt", tiny_backbone) == tokens(tiny_backbone, written["1.txt"])


def test_what_is_hidden_on_a_server_is_passed_over_too(
    tmp_path: Path, tiny_backbone: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_all(tmp_path, ["1.txt", "a/2.txt"])
    write_all(tmp_path, [".git/x.txt", ".y.txt"])
    assert read_all(server.serve(tmp_path), tiny_backbone) == tokens(tiny_backbone, sum(written.values(), []))
    assert "2 (.git/x.txt, .y.txt) hidden" in capsys.readouterr().out


def test_a_file_is_read_once(tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_all(tmp_path, ["x.txt", "y.jsonl", "z.txt"])
    for name in ("x.txt.gz", "y.jsonl.zst"):
        write(tmp_path, name, written[name.rpartition(".")[0]])
    other = [text(999)]
    write(tmp_path, "z.txt.gz", other)  # of the same name, with another text
    everything = tokens(tiny_backbone, [*sum(written.values(), []), *other])
    paths = [str(tmp_path), f"{tmp_path}/../{tmp_path.name}", str(tmp_path / "x.txt")]
    assert read_all(paths, tiny_backbone) == read_all(tmp_path, tiny_backbone) == everything
    assert "2 (x.txt.gz, y.jsonl.zst) the same as others" in capsys.readouterr().out
    path = {"train": str(tmp_path), "validation": str(tmp_path / "x.txt")}
    found = splits_of(opened(path, tiny_backbone, split="hash", validation_fraction=0.3), "fit", "test")
    assert sorted(sum(found.values(), [])) == everything


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst"])
def test_a_damaged_copy_is_told_and_not_taken_for_the_same(name: str, tmp_path: Path, tiny_backbone: Path) -> None:
    written = write_all(tmp_path, ["x.txt"])["x.txt"]
    write(tmp_path, name, written)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-12])
    with pytest.raises(UserError, match=f"{name} .*cannot be read"):
        read_all(tmp_path, tiny_backbone)
    assert read_all(tmp_path, tiny_backbone, on_bad_document="skip") == tokens(tiny_backbone, written)


def test_a_link_between_splits_is_on_one_side(tmp_path: Path, tiny_backbone: Path) -> None:
    written = write_all(tmp_path, ["train/a.txt", "test/b.txt", "valid/c.txt"])
    link(tmp_path / "train" / "b.txt", tmp_path / "test" / "b.txt")
    assert splits_of(opened(tmp_path, tiny_backbone), "fit", "test") == {
        "train": tokens(tiny_backbone, written["train/a.txt"]),
        "validation": tokens(tiny_backbone, written["valid/c.txt"]),
        "test": tokens(tiny_backbone, written["test/b.txt"]),
    }


@pytest.mark.parametrize("salt", range(10))
def test_equal_texts_are_told_and_on_one_side_of_a_hash(
    salt: int, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(9):
        for copy in range(3):
            write(tmp_path, f"{salt}/{copy}/{i}.txt", [text(i)])
    found = splits_of(opened(tmp_path, tiny_backbone, validation_fraction=0.3), "fit", "test")
    sides = [set(documents) for documents in found.values()]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == 9
    assert sum(map(len, found.values())) == 27 and "equal to other documents of it" in capsys.readouterr().out


def test_equal_texts_in_two_splits_are_told(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("raw/train-0.parquet", "raw/test-0.parquet", "small/train-0.parquet", "small/test-0.parquet"):
        write(tmp_path, name, [text(len(name))])
    write(tmp_path, "small/validation-0.parquet", [text(len("raw/train-0.parquet"))])
    splits_of(opened(tmp_path, tiny_backbone))
    assert "WARNING: 1 (raw/train-0.parquet:1) of train are also in validation" in capsys.readouterr().out
    splits_of(opened(tmp_path, tiny_backbone, cache=False))
    assert "WARNING: 1 (raw/train-0.parquet) of train are also in validation" in capsys.readouterr().out


# ---- what a file is -----------------------------------------------------------------------------------------


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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
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
    "bzip2": ("a.txt", bz2.compress(b"kan los"), "bzip2"),
    "xz": ("a.txt", lzma.compress(b"kan los"), "xz"),
    "array": ("a.jsonl", b'[\n{"text": "kan"}]', "jq -c"),
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
    for name in ("train/a.txt", "valid/b.txt"):
        write(tmp_path, name, [content])
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


# ---- errors that say what is wrong --------------------------------------------------------------------------


def test_an_address_without_an_ending_is_a_text(tmp_path: Path, tiny_backbone: Path, server: Server) -> None:
    root = server.serve_bodies({"/pg/2701": b"kan los " * 20})
    assert read_all(f"{root}/pg/2701", tiny_backbone) == tokens(tiny_backbone, ["kan los " * 20])
    assert read_all(f"{root.upper()}/pg/2701", tiny_backbone) == tokens(tiny_backbone, ["kan los " * 20])


ERRORS: dict[str, tuple[Any, str]] = {
    "gs": ("gs://deepmind-gutenberg/train", "gcsfs"),
    "s3": ("s3://bucket/a.txt", "s3fs"),
    "unknown": ("foo://a/b.txt", "cannot be opened.*foo"),
    "refused file": ("http://127.0.0.1:9/a.txt", "Connect.*tried 1 times"),
    "refused folder": ("http://127.0.0.1:9/a", "Connect.*tried 1 times"),
    "empty": ("", "data.path=''.*at least one path"),
    "blank": (" ", "data.path=' '.*at least one path"),
    "no list": ([], "data.path=.*at least one path"),
    "no split": ({}, "data.path=.*at least one path"),
    "empty split": ({"train": "a", "validation": ""}, "data.path=.*at least one path"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_places_that_cannot_be_read_are_told_with_the_cause(case: str, tiny_backbone: Path) -> None:
    path, words = ERRORS[case]
    with pytest.raises(UserError, match=words):
        read_all(path, tiny_backbone, retries=0)


def test_a_server_that_does_not_answer_is_given_up_in_time(tiny_backbone: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for place in ("a.txt", "folder/"):
            begin = time.monotonic()
            with pytest.raises(UserError, match=r"Timeout.*--data.timeout_s"):
                read_all(f"{address}/{place}", tiny_backbone, retries=0, timeout_s=0.3)
            assert time.monotonic() - begin < 10


def test_a_pipe_is_told(tmp_path: Path, tiny_backbone: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe"):
        read_all(tmp_path / "pipe", tiny_backbone)


@pytest.mark.parametrize("extensions", [[".TXT"], ["*.txt"], ["txt"], [".Txt", ".md"]])
def test_endings_are_understood_as_people_write_them(
    extensions: list[str], tmp_path: Path, tiny_backbone: Path
) -> None:
    written = write_all(tmp_path, ["a.txt", "b.TXT"])
    write_all(tmp_path, ["c.jsonl"])
    found = read_all(tmp_path, tiny_backbone, extensions=extensions)
    assert found == tokens(tiny_backbone, sum(written.values(), []))


@pytest.mark.parametrize("cache", [True, False])
def test_names_that_are_no_utf_8_are_read(cache: bool, tmp_path: Path, tiny_backbone: Path) -> None:
    for number, part in enumerate(("train", "valid")):
        (tmp_path / part).mkdir()
        (tmp_path / part / os.fsdecode(b"\xffbook.txt")).write_text(text(number))
        (tmp_path / part / os.fsdecode(b"\xfflink.txt")).symlink_to("nowhere")
    found = splits_of(opened(tmp_path, tiny_backbone, cache=cache))
    assert found == {"train": tokens(tiny_backbone, [text(0)]), "validation": tokens(tiny_backbone, [text(1)])}
    data = opened(tmp_path, tiny_backbone, cache=cache, split="hash", validation_fraction=0.4)
    assert sum(map(len, splits_of(data, "validate").values())) >= 1
    print(dict(data.whole_documents("validation")))


def test_a_row_nested_too_deep_spoils_itself_only(tmp_path: Path, tiny_backbone: Path) -> None:
    deep = '{"text": "a", "m": ' + "[" * 20_000 + "]" * 20_000 + "}"
    lines = [json.dumps({"text": text(0)}), deep, json.dumps({"text": text(1)})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_all(tmp_path, tiny_backbone, on_bad_document="skip") == tokens(tiny_backbone, [text(0), text(1)])


def test_pzstd_and_padded_gzip_are_read(tmp_path: Path, tiny_backbone: Path) -> None:
    rows = json.dumps({"text": text(0)}).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows) + b"\0" * 512)
    assert read_all(tmp_path, tiny_backbone) == tokens(tiny_backbone, [text(0)] * 2)


def test_nothing_left_names_the_first_reason(tmp_path: Path, tiny_backbone: Path) -> None:
    (tmp_path / "a.txt").write_bytes(POINTER)
    with pytest.raises(UserError, match="nothing is left.*a.txt: it is a Git LFS pointer"):
        read_all(tmp_path, tiny_backbone, on_bad_document="skip")


def test_what_comes_before_a_cut_is_read(tmp_path: Path, tiny_backbone: Path) -> None:
    texts = [text(i, 400) for i in range(40)]
    write(tmp_path, "a.jsonl.gz", texts)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-60])
    found = read_all(file, tiny_backbone, on_bad_document="skip")
    assert len(found) > 30 and set(found) < set(tokens(tiny_backbone, texts))
