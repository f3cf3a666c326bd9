"""Places and files that cannot be read as they are: errors that say what is wrong."""

import gzip
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lightning_memlong.errors import UserError
from tests.server import Server
from tests.unit.datamodules.layouts import POINTER, opened, read_all, splits_of, text, tokens, write, write_all


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
    "unknown host": ("http://nowhere.invalid/a.txt", "nowhere.invalid.*tried 1 times"),
    "unknown host's folder": ("http://nowhere.invalid/a", "nowhere.invalid.*tried 1 times"),
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


@pytest.mark.parametrize("place", ["a.txt", "a.jsonl", "folder/", "x/*.txt"])
def test_a_server_that_sends_everyone_on_for_ever_is_told(place: str, tiny_backbone: Path, server: Server) -> None:
    with pytest.raises(UserError, match="the server answers 302 .sends on. again and again"):
        read_all(f"{server.serve_redirects()}/{place}", tiny_backbone, retries=9)


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


def test_a_window_that_is_too_long_is_told(tmp_path: Path, tiny_backbone: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, hash_log=6, chain_log=6, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(packer.compress(b"kan los " * 20) + packer.flush())
    with pytest.raises(UserError, match="zstd --long, .*zstd -d --long=31"):
        read_all(tmp_path, tiny_backbone)


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
