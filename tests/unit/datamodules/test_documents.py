"""Windows of documents: nothing lost, nothing mixed, everything scored once, any batch reachable at once."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from datamodules import LocalText
from datamodules import cached as cached_module
from datamodules import streaming as streaming_module
from datamodules.cached import CachedStream
from datamodules.records import Document
from datamodules.shuffle import SplitDocuments
from datamodules.splits import by_hash, by_name
from datamodules.streaming import LiveStream
from lightning_memlong.errors import UserError
from lightning_memlong.text import Batch, Windows, window_offsets

CHUNK = 4
Stream = CachedStream | LiveStream


class Numbers:
    """A tokenizer of numbers."""

    def __call__(self, texts: list[str], **kwargs: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def tokens_of(document: int, length: int) -> np.ndarray:
    """Tokens that tell where they come from: 1000 * document + place."""
    return 1000 * document + np.arange(length)


class InMemory:
    """Documents as tokens, not on disk."""

    name = "numbers"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.ids = lengths, [str(i) for i in range(len(lengths))]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return tokens_of(document, self.lengths[document]).astype(np.int32)[start:stop]


def windows(window: int, stride: int, rows: int) -> Windows:
    return Windows(window, stride, rows, 999_999)


def cached(lengths: list[int], window: int, stride: int, rows: int, seed: int | None = 0, workers: int = 0) -> Stream:
    return CachedStream(InMemory(lengths), range(len(lengths)), windows(window, stride, rows), seed, workers)


def live(
    lengths: list[int],
    window: int,
    stride: int,
    rows: int,
    seed: int | None = 0,
    workers: int = 0,
    buffer: int = 3,
    shortest: int = 2,
) -> LiveStream:
    """Documents over shards of one, two, three, ... documents; row r of shard s begins a document."""
    numbers = iter(range(len(lengths)))
    shards = [list(part) for size in range(1, len(lengths) + 1) if (part := list(islice(numbers, size)))]

    def read(shard: int, start: int) -> Iterator[Document]:
        for row, document in enumerate(shards[shard]):
            if row >= start:
                text = " ".join(map(str, tokens_of(document, lengths[document])))
                yield Document(str(document), text, (shard, row))

    source = SplitDocuments("numbers", tuple(map(str, range(len(shards)))), read, "digest")
    return LiveStream(
        source, Numbers(), windows(window, stride, rows), seed, buffer, workers, shortest, None, never_bad
    )  # type: ignore[arg-type]


def never_bad(document: Document, length: int) -> bool:
    return False


def in_ranks(make: Callable[[], Stream], world: int, patch: pytest.MonkeyPatch) -> list[list[Batch]]:
    """The batches of every rank of one epoch; the ranks run side by side and can ask each other."""
    mine, flags, barrier = threading.local(), [False] * world, threading.Barrier(world)

    def any_rank(flag: bool) -> bool:
        flags[mine.rank] = flag
        barrier.wait(10)
        told = any(flags)
        barrier.wait(10)
        return told

    def run(rank: int) -> list[Batch]:
        mine.rank = rank
        return list(make())

    for module in (cached_module, streaming_module):
        patch.setattr(module, "rank_and_world", lambda: (mine.rank, world))
    patch.setattr(streaming_module, "any_rank", any_rank)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


shapes = st.tuples(
    st.lists(st.integers(2, 60), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)
)
KINDS = pytest.mark.parametrize("kind", [cached, live])


def places(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    return [(b["document_id"].tolist(), b["offset"].tolist()) for b in batches]


@KINDS
@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes, st.integers(1, 3))
def test_documents_come_out_whole_and_every_label_once(
    kind: Callable[..., Stream], shape: tuple[list[int], int, int, int], world: int
) -> None:
    lengths, chunks, step, rows = shape
    window, stride = chunks * CHUNK, min(step, chunks) * CHUNK
    with pytest.MonkeyPatch.context() as patch:
        ranks = in_ranks(lambda: kind(lengths, window, stride, rows), world, patch)
    assert len({len(batches) for batches in ranks}) == 1, "an epoch ends together"
    read: dict[int, list[int]] = {i: [] for i in range(len(lengths))}
    labelled: list[int] = []
    readers: dict[int, set[tuple[int, int]]] = {i: set() for i in range(len(lengths))}
    for rank, batches in enumerate(ranks):
        previous: dict[int, tuple[int, int]] = {}
        for batch in batches:
            assert batch["input_ids"].shape == batch["labels"].shape == (rows, window)
            for row in range(rows):
                document, offset, length = (int(batch[k][row]) for k in ("document_id", "offset", "length"))
                overlap = int(batch["overlap"][row])
                ids, labels = batch["input_ids"][row], batch["labels"][row]
                assert (labels[labels != -100] == ids[labels != -100]).all()
                if document < 0:
                    assert length == 0 and not batch["document_start"][row]
                    continue
                number = int(ids[0]) // 1000
                assert (ids[:length] // 1000 == number).all() and (ids[length:] == 999_999).all()
                assert bool(batch["document_start"][row]) == (offset == 0)
                if offset:
                    assert previous[row] == (document, offset - stride), "a row goes on with its own document"
                previous[row] = (document, offset)
                readers[number].add((rank, row))
                read[number] += ids[overlap:length].tolist()
                labelled += labels[labels != -100].tolist()
                if offset and stride < window:
                    first = int((labels != -100).nonzero()[0])
                    assert first >= window - stride, "a scored token sees window - stride tokens"
    for document, tokens in read.items():
        assert tokens == tokens_of(document, lengths[document]).tolist()
        assert len(readers[document]) == 1, "one rank, one row"
    assert len(labelled) == len(set(labelled))
    if stride < window:
        assert len(labelled) == sum(n - 1 for n in lengths)


@KINDS
@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.integers(0, 40), st.integers(0, 2))
def test_any_batch_of_any_epoch_is_reached_again(
    kind: Callable[..., Stream], shape: tuple[list[int], int, int, int], start: int, epoch: int
) -> None:
    lengths, chunks, step, rows = shape
    window, stride = chunks * CHUNK, min(step, chunks) * CHUNK
    unbroken = kind(lengths, window, stride, rows)
    for _ in range(epoch):
        list(unbroken)
    whole: list[Batch] = []
    position = None
    for number, batch in enumerate(unbroken):
        if number == start + 1:  # Lightning has taken one more than it has used
            position = unbroken.position(epoch, start)
        whole.append(batch)
    start = min(start, len(whole))
    position = position or unbroken.position(epoch, start)
    following = list(unbroken)
    again = kind(lengths, window, stride, rows)
    again.resume(json.loads(json.dumps(position)))
    rest = list(again)
    assert len(rest) == len(whole) - start
    for a, b in zip(whole[start:], rest, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert places(list(again)) == places(following), "and so is the next epoch"


@KINDS
def test_epochs_differ_in_order_only(kind: Callable[..., Stream]) -> None:
    s, again = kind([9] * 20, 8, 8, 2), kind([9] * 20, 8, 8, 2)
    orders = [[b["document_id"].tolist() for b in s] for _ in range(2)]
    iter(again)  # made and thrown away
    assert [b["document_id"].tolist() for b in again] == orders[0] != orders[1]
    assert sorted(sum(orders[0], [])) == sorted(sum(orders[1], []))
    other = kind([9] * 20, 8, 8, 2, seed=1)
    assert [b["document_id"].tolist() for b in other] != orders[0]
    unshuffled = kind([9] * 3, 8, 8, 1, seed=None)
    assert [int(b["input_ids"][0, 0]) // 1000 for b in unshuffled] == [0, 0, 1, 1, 2, 2]


@KINDS
def test_workers_change_nothing(kind: Callable[..., Stream]) -> None:
    lengths = [17, 40, 3, 26, 9, 33, 12]
    alone, helped = kind(lengths, 8, 8, 2), kind(lengths, 8, 8, 2, workers=2)
    batches = [list(alone), list(helped)]
    assert places(batches[0]) == places(batches[1])
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*batches, strict=True))
    middle = kind(lengths, 8, 8, 2, workers=1)
    middle.resume(alone.position(0, 5))
    assert places(list(middle)) == places(batches[0][5:])


def test_a_block_is_shuffled_as_far_as_the_buffer_goes() -> None:
    def documents(buffer: int) -> list[int]:
        batches = live([5] * 55, 8, 8, 1, buffer=buffer)
        return [int(b["input_ids"][0, 0]) // 1000 for b in batches]

    assert len(documents(1)) == 55 and documents(1) != sorted(documents(1)), "shards are shuffled"
    mixed = documents(10)
    assert sorted(mixed) == list(range(55)) and mixed != documents(1)
    inside = [sorted(mixed[i : i + 10]) == sorted(documents(1)[i : i + 10]) for i in range(0, 55, 10)]
    assert all(inside), "nothing leaves its block"


def test_a_place_can_be_saved_again_before_the_first_step_after_a_resume() -> None:
    whole = live([17, 40, 3, 26], 8, 8, 2)
    list(whole)
    again = live([17, 40, 3, 26], 8, 8, 2)
    again.resume(whole.position(0, 4))
    assert again.position(0, 4) == whole.position(0, 4)
    next(iter(again))
    assert again.position(0, 4) == whole.position(0, 4)


def test_a_file_named_after_two_splits_is_in_neither() -> None:
    own = {"train": "train", "validation": "validation", "test": "test"}
    names = ["train.txt", "validation.txt", "train_test_mix.txt"]
    apart = {"train": [0], "validation": [1], "test": []}
    assert by_name(names, own).parts == by_name(names[:2], own).parts == apart
    assert by_name(names[:2], own | {"test": "validation"}).parts["test"] == [1]
    assert by_name(["train/a.txt", "test/b.txt", "c.txt"], own).parts == {"train": [0], "validation": [], "test": [1]}


def test_what_is_left_out_is_counted_also_after_a_resume() -> None:
    def make() -> LiveStream:
        return live([9, 3, 20, 3, 3, 17, 3, 9], 8, 8, 1, shortest=8)

    whole = make()
    batches = list(whole)
    assert whole.left_out() == "8 documents read; left out: 4 shorter than 8 tokens"
    again = make()
    again.resume(whole.position(0, len(batches) - 1))
    assert len(list(again)) == 1 and again.left_out() == whole.left_out()
    with pytest.raises(UserError, match="no document of numbers can be read.*3 shorter than 8.*min_document_tokens"):
        list(live([3, 3, 3], 8, 8, 1, shortest=8))


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
    parts = {k: {data.document_name(k, i) for i in v.documents} for k, v in data.streams.items()}  # type: ignore[union-attr]
    assert parts.keys() == {"train", "validation", "test"} and all(parts.values())
    assert set.union(*parts.values()) == {f.name for f in text_folder.iterdir()} and sum(map(len, parts.values())) == 24
    texts = {f.name: f.read_text() for f in text_folder.iterdir()} | {"new.txt": "another text"}
    kept = sorted(parts["train"] | {"new.txt"})
    fewer = by_hash(kept, [Document(name, texts[name]).digest() for name in kept], 0.2)
    held = {kept[i] for part in ("validation", "test") for i in fewer[part]}
    assert {kept[i] for i in fewer["train"]} >= parts["train"] - held


def test_folders_named_like_splits_are_the_splits(tmp_path: Path, tiny_backbone: Path) -> None:
    for name in ("train/a.txt", "train/b.md", "validation/c.tex", "ignored.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"kan los mith nex {Path(name).stem} " * 60)
    data = local(tmp_path, tiny_backbone)
    data.setup("fit")
    assert {k: [data.document_name(k, i) for i in s.documents] for k, s in data.streams.items()} == {  # type: ignore[union-attr]
        "train": ["train/a.txt", "train/b.md"],
        "validation": ["validation/c.tex"],
    }
    with pytest.raises(UserError, match="no test split. Allowed: train, validation.*--data.test_split"):
        data.setup("test")
    renamed = local(tmp_path, tiny_backbone, test_split="validation")
    renamed.setup("test")
    assert [renamed.document_name("test", i) for i in renamed.streams["test"].documents] == ["validation/c.tex"]  # type: ignore[union-attr]


def test_one_document_can_be_evaluated_but_not_split(tmp_path: Path, tiny_backbone: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("kan los mith nex " * 60)
    data = local(book, tiny_backbone)
    data.setup("validate")
    assert len(data.streams["validation"].documents) == 1
    with pytest.raises(UserError, match="data.split"):
        local(book, tiny_backbone).setup("fit")
    with pytest.raises(UserError, match="data.split='all'"):
        local(book, tiny_backbone, split="all", cache=False).setup("fit")


def test_short_documents_are_left_out_and_counted(
    text_folder: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = local(text_folder, tiny_backbone, min_document_tokens=500)
    data.setup("fit")
    told = re.search(r"(\d+) shorter than 500 tokens left out", capsys.readouterr().out)
    assert told and 0 < int(told[1]) < 24 and sum(len(s.documents) for s in data.streams.values()) == 24 - int(told[1])  # type: ignore[union-attr]
    capped = local(text_folder, tiny_backbone, max_document_tokens=100)
    capped.setup("fit")
    stream = capped.streams["train"]
    assert len(stream) == 2 * len(stream.documents) and sum(int(b["length"]) for b in stream) == 100 * len(
        stream.documents
    )


@pytest.mark.parametrize("count", range(1, 12))
def test_a_handful_of_documents_is_split_without_overlap(count: int) -> None:
    for salt in range(40):
        names = [f"{salt}-{i}.txt" for i in range(count)]
        parts = by_hash(names, names, 0.05)
        train, rest = set(parts["train"]), set(parts["validation"]) | set(parts["test"])
        assert not train & rest and train | rest == set(range(count)) and parts["validation"] and parts["test"]
        if count >= 2:
            assert train, "there is something to train on"
        if count >= 3:
            assert not set(parts["validation"]) & set(parts["test"])


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
    for content, words in ((b"\xff\xfe\x00", "not UTF-8"), (b"a\x00b", "binary file")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"bad.txt.*{words}"):
            local(tmp_path, tiny_backbone).setup("fit")
