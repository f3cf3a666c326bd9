"""Options are one value; what finds and opens text needs it and a corpus, and no DataModule."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from datamodules import Columns, Document, DocumentDataModule, Hub, Shard
from datamodules.corpus import Corpus
from datamodules.open_split import open_split
from datamodules.resolve_source import resolve_source
from datamodules.settings import DataSettings, choose_hub
from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.errors import UserError


def settings(path: Path, backbone: Path, **more: Any) -> DataSettings:
    small = {"path": str(path), "tokenizer": str(backbone), "chunk_size": 16, "window": 32, "num_workers": 0}
    return DocumentDataModule(**(small | more)).settings


@pytest.mark.parametrize("cache", [True, False])
def test_text_is_found_and_opened_without_a_data_module(cache: bool, tmp_path: Path, tiny_backbone: Path) -> None:
    for part, words in (("train", 50), ("validation", 20), ("skipped", 30)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.txt").write_text("kan los " * (words // 2))

    class Files(Corpus):
        name = "files"

        def wanted(self, file: str) -> bool:
            return not file.startswith("skipped")

    options, corpus = settings(tmp_path, tiny_backbone, cache=cache), Files()
    source = resolve_source(options, corpus)
    assert {part: [shard.name for shard in shards] for part, shards in source.shards.items()} == {
        "train": ["train/a.txt"], "validation": ["validation/a.txt"], "test": []
    }  # fmt: skip
    tokenizer = load_tokenizer(str(tiny_backbone))
    stream = open_split(options, corpus, source, tokenizer, "validation", "fit")["validation"]
    assert [int(batch["length"][0]) for batch in stream] == [20]


def test_settings_cannot_be_changed(tmp_path: Path, tiny_backbone: Path) -> None:
    options = settings(tmp_path, tiny_backbone)
    assert options.stride == options.window == 32 and options.shortest == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.window = 64  # type: ignore[misc]
    with pytest.raises(UserError, match="data.stride=24"):
        dataclasses.replace(options, stride=24)
    assert options.shuffle_seed("train") == 0 and options.shuffle_seed("validation") is None


def test_another_data_set_has_nothing_of_the_corpus_s_own() -> None:
    own = Hub("a/b", "configured", files={"train": "*.txt"})
    assert choose_hub(own, None, None, None, None) == choose_hub(own, "a/b", None, None, None) == own
    assert choose_hub(own, None, "other", "v1", None) == Hub("a/b", "other", "v1", {"train": "*.txt"})
    assert choose_hub(own, "c/d", None, None, None) == Hub("c/d")
    assert choose_hub(None, None, None, None, None) == Hub("")


class Poems(DocumentDataModule):
    """A corpus as a user writes it: a document is a row of several lines, joined to one."""

    name = "poems"
    hub = Hub("nobody/poems")
    columns = Columns("body")

    def documents(self, shards: Sequence[Shard], index: int, start: int = 0) -> Iterator[Document]:
        """Poems are rows of several lines."""
        for row in shards[index].rows(start):
            if "\n" in row.text:
                yield self.document(shards, index, row, row.text.replace("\n", " "))


def test_a_corpus_of_one_s_own(tmp_path: Path, tiny_backbone: Path) -> None:
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        rows = [{"body": "kan los\n" * 20}, {"body": "title"}, {"body": "mith nex\n" * 30}]
        (tmp_path / part / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Poems(path=str(tmp_path), tokenizer=str(tiny_backbone), chunk_size=16, window=32, shuffle=False)
    assert data.hub_source == Poems.hub
    data.setup("fit")
    assert [(name, len(tokens)) for name, tokens in data.whole_documents("validation")] == [
        ("validation/a.jsonl:1", 40), ("validation/a.jsonl:3", 60)
    ]  # fmt: skip
    assert [name for name, _ in data.texts()] == [f"{p}/a.jsonl:{i}" for p in ("train", "validation") for i in (1, 3)]
