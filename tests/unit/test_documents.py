"""Windows of documents: nothing lost, nothing mixed, everything scored once, any batch reachable at once."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from datamodules import LocalText
from datamodules.documents import DocumentStream, window_offsets
from datamodules.token_cache import Document, TokenCache
from lightning_memlong.backbones import load_tokenizer
from lightning_memlong.errors import UserError

CHUNK = 4


class Corpus(TokenCache):
    """Documents whose tokens tell where they come from: 1000 * document + place."""

    def __init__(self, lengths: list[int]) -> None:
        self.name = "corpus"
        self.lengths, self.ids = lengths, [str(i) for i in range(len(lengths))]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._tokens = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(lengths)]).astype(np.int32)


def stream(lengths: list[int], window: int, stride: int, rows: int, seed: int | None = 0) -> DocumentStream:
    return DocumentStream(Corpus(lengths), range(len(lengths)), window, stride, rows, pad=999_999, seed=seed)


shapes = st.tuples(
    st.lists(st.integers(2, 60), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes)
def test_documents_come_out_whole_and_every_label_once(shape: tuple[list[int], int, int, int]) -> None:
    lengths, chunks, step, rows = shape
    window, stride = chunks * CHUNK, min(step, chunks) * CHUNK
    batches = list(stream(lengths, window, stride, rows))
    read: dict[int, list[int]] = {i: [] for i in range(len(lengths))}
    labelled: list[int] = []
    previous: dict[int, tuple[int, int]] = {}
    for batch in batches:
        assert batch["input_ids"].shape == batch["labels"].shape == (rows, window)
        for row in range(rows):
            document, offset, length = (int(batch[k][row]) for k in ("document_id", "offset", "length"))
            fresh = int(batch["fresh"][row])
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            assert (labels[labels != -100] == ids[labels != -100]).all()
            if document < 0:
                assert length == 0 and not batch["document_start"][row]
                continue
            assert (ids[:length] // 1000 == document).all() and (ids[length:] == 999_999).all()
            assert bool(batch["document_start"][row]) == (offset == 0)
            if offset:
                assert previous[row] == (document, offset - stride), "a row goes on with its own document"
            previous[row] = (document, offset)
            read[document] += ids[fresh:length].tolist()
            labelled += labels[labels != -100].tolist()
            if offset and stride < window:
                first = int((labels != -100).nonzero()[0])
                assert first >= window - stride, "a scored token sees window - stride tokens"
    for document, tokens in read.items():
        assert tokens == [1000 * document + i for i in range(lengths[document])]
    assert len(labelled) == len(set(labelled))
    if stride < window:
        assert len(labelled) == sum(n - 1 for n in lengths)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.integers(0, 40))
def test_any_batch_is_reached_directly(shape: tuple[list[int], int, int, int], start: int) -> None:
    lengths, chunks, step, rows = shape
    window, stride = chunks * CHUNK, min(step, chunks) * CHUNK
    whole = list(stream(lengths, window, stride, rows))
    later = stream(lengths, window, stride, rows)
    later.first_batch = min(start, len(whole))
    rest = list(later)
    assert len(rest) == len(whole) - min(start, len(whole)) and len(later) == len(whole)
    for a, b in zip(whole[min(start, len(whole)) :], rest, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(list(later)) == len(later) and later.epoch == 1, "the next epoch begins at its beginning"


def test_epochs_differ_in_order_only() -> None:
    s, again = stream([9] * 20, 8, 8, 2), stream([9] * 20, 8, 8, 2)
    orders = [[b["document_id"].tolist() for b in s] for _ in range(2)]
    iter(again)  # made and thrown away
    assert [b["document_id"].tolist() for b in again] == orders[0] != orders[1]
    assert sorted(sum(orders[0], [])) == sorted(sum(orders[1], []))
    unshuffled = stream([9] * 3, 8, 8, 1, seed=None)
    assert [int(b["document_id"][0]) for b in unshuffled] == [0, 0, 1, 1, 2, 2]


def test_offsets() -> None:
    assert window_offsets(5, 8, 8) == [0]
    assert window_offsets(17, 8, 8) == [0, 8, 16]
    assert window_offsets(17, 8, 4) == [0, 4, 8, 12]


def local(folder: Path, backbone: Path, **settings: object) -> LocalText:
    base: dict[str, object] = {"path": str(folder), "tokenizer": str(backbone), "chunk_size": 16, "window": 64}
    return LocalText(**(base | settings))  # type: ignore[arg-type]


def test_splits_are_disjoint_stable_and_whole(text_folder: Path, tiny_backbone: Path) -> None:
    data = local(text_folder, tiny_backbone, validation_fraction=0.2)
    data.setup("fit")
    parts = {k: set(v.documents) for k, v in data._streams.items()}
    assert set.union(*parts.values()) == set(range(24)) and sum(map(len, parts.values())) == 24
    names = {k: {data.document_ids[i] for i in v} for k, v in parts.items()}
    fewer = local(text_folder, tiny_backbone, validation_fraction=0.2).split(
        sorted(names["train"] | {"new.txt"}), "fit"
    )
    kept = sorted(names["train"] | {"new.txt"})
    assert {kept[i] for i in fewer["train"]} >= names["train"] - {
        kept[i] for p in ("validation", "test") for i in fewer[p]
    }


def test_folders_named_like_splits_are_the_splits(tmp_path: Path, tiny_backbone: Path) -> None:
    for name in ("train/a.txt", "train/b.md", "validation/c.tex", "ignored.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("kan los mith nex " * 60)
    data = local(tmp_path, tiny_backbone)
    data.setup("fit")
    assert {k: [data.document_ids[i] for i in s.documents] for k, s in data._streams.items()} == {
        "train": ["train/a.txt", "train/b.md"],
        "validation": ["validation/c.tex"],
        "test": [],
    }


def test_one_document_can_be_evaluated_but_not_split(tmp_path: Path, tiny_backbone: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("kan los mith nex " * 60)
    data = local(book, tiny_backbone)
    data.setup("validate")
    assert len(data._streams["validation"].documents) == 1
    with pytest.raises(UserError, match="data.split"):
        local(book, tiny_backbone).setup("fit")


def test_short_documents_are_left_out_and_counted(
    text_folder: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = local(text_folder, tiny_backbone, min_document_tokens=500)
    data.setup("fit")
    assert 0 < data.left_out < 24 and f"{data.left_out} shorter than 500 tokens left out" in capsys.readouterr().out
    capped = local(text_folder, tiny_backbone, max_document_tokens=100)
    capped.setup("fit")
    stream = capped._streams["train"]
    assert len(stream) == 2 * len(stream.documents) and sum(int(b["length"]) for b in stream) == 100 * len(
        stream.documents
    )


@pytest.mark.parametrize("count", range(1, 12))
def test_a_handful_of_documents_is_split_without_overlap(tiny_backbone: Path, count: int) -> None:
    for salt in range(40):
        names = [f"{salt}-{i}.txt" for i in range(count)]
        parts = local(tiny_backbone, tiny_backbone).split(names, "test")
        train, rest = set(parts["train"]), set(parts["validation"]) | set(parts["test"])
        assert not train & rest and train | rest == set(range(count)) and parts["validation"] and parts["test"]
        if count >= 2:
            assert train, "there is something to train on"
        if count >= 3:
            assert not set(parts["validation"]) & set(parts["test"])


def test_cache_is_keyed_by_text_and_tokenizer_and_survives_a_kill(tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    a = TokenCache.build([Document("a", "kan los")], tokenizer, "t")
    b = TokenCache.build([Document("a", "kan nex")], tokenizer, "t")
    assert a.tokens(0, 0, 9).tolist() == tokenizer("kan los")["input_ids"] != b.tokens(0, 0, 9).tolist()

    class Killed(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    broken = Killed(tokenizer_object=tokenizer.backend_tokenizer)
    texts = [Document("a", "los los")]
    with pytest.raises(KeyboardInterrupt):
        TokenCache.build(texts, broken, "t")
    assert TokenCache.build(texts, tokenizer, "t").tokens(0, 0, 9).tolist() == tokenizer("los los")["input_ids"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 100}, ["data.window=100", "chunk_size=16"]),
        ({"stride": 24}, ["data.stride=24", "chunk_size=16"]),
        ({"stride": 128}, ["data.stride=128", "at most data.window=64"]),
        ({"split": "random"}, ["data.split='random'", "auto, hash, folders, all"]),
        ({"validation_fraction": 0.9}, ["data.validation_fraction=0.9"]),
        ({"path": "/nowhere"}, ["data.path='/nowhere'", "does not exist"]),
        ({"min_document_tokens": 10**6}, ["data.min_document_tokens=1000000", "Fix: lower it"]),
    ],
)
def test_bad_settings_are_told(
    settings: dict[str, object], words: list[str], text_folder: Path, tiny_backbone: Path
) -> None:
    with pytest.raises(UserError) as error:
        local(text_folder, tiny_backbone, **settings).setup("fit")
    assert all(word in str(error.value) for word in words)


def test_bad_files_are_told(tmp_path: Path, tiny_backbone: Path) -> None:
    with pytest.raises(UserError, match="holds no text.*--data.extensions"):
        local(tmp_path, tiny_backbone).setup("fit")
    for content, words in ((b"\xff\xfe\x00", "cannot be read as text"), (b"a\x00b", "binary file")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"bad.txt.*{words}"):
            local(tmp_path, tiny_backbone).setup("fit")
