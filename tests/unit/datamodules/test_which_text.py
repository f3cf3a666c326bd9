"""Which text a cache or a checkpoint is of."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.sources import FileShard
from lightning_memlong.errors import UserError
from lightning_memlong.text import Windows, WindowSpec
from tests.server import Server
from tests.unit.datamodules.layouts import opened, splits_of, tokens, write


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
    write(tmp_path, "train/a.txt", ["kan los " * 100])
    write(tmp_path, "valid/b.txt", ["los kan " * 100])
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
