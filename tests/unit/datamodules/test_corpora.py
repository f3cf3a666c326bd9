"""What a document is in each corpus, and what becomes of text that cannot be used."""

import json
import pickle
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules import PG19, BookCorpus, LocalText, ProofPile, WikiText103
from datamodules.documents import DocumentDataModule
from datamodules.files import find_files
from datamodules.records import Document
from datamodules.token_cache import TokenCache
from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.errors import UserError
from lightning_memlong.files import cache_dir
from lightning_memlong.text import tokenise

WORDS = ["kan", "los", "mith", "nex", "pur", "ras"]


def text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def documents(data: DocumentDataModule, path: Path) -> list[Document]:
    """All documents behind a path; any of them can be the first that is read."""
    shards = find_files(str(path), data.settings.extensions, data.columns, 0)
    found = []
    for index in range(len(shards)):
        here = list(data.documents(shards, index))
        for i, document in enumerate(here):
            assert document.place[0] == index
            assert list(data.documents(shards, index, document.place[1])) == here[i:], "read again from here"
        found += here
    return found


def settings(path: object, backbone: Path, **more: Any) -> dict[str, Any]:
    place = str(path) if isinstance(path, Path) else path
    return {"path": place, "tokenizer": str(backbone), "chunk_size": 16, "window": 32, "num_workers": 0} | more


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# ---- documents --------------------------------------------------------------------------------------------


def test_a_book_or_a_paper_is_a_file_or_a_row(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("one\n\ntwo")
    (tmp_path / "2.tex").write_text("\\section{three}")
    write_rows(tmp_path / "3.jsonl", [{"text": "four", "meta": "{}"}, {"text": "five", "meta": "{}"}])
    assert [(d.id, d.text) for d in documents(ProofPile(), tmp_path)] == [
        ("1.txt", "one\n\ntwo"),
        ("2.tex", "\\section{three}"),
        ("3.jsonl:1", "four"),
        ("3.jsonl:2", "five"),
    ]
    assert [d.id for d in documents(PG19(), tmp_path)] == ["1.txt", "3.jsonl:1", "3.jsonl:2"]


ARTICLES = [
    " = Robert Boulter = \n \n An actor . \n \n = = Career = = \n \n He acted . \n a = b = c \n",
    " = Du Fu = \n \n A poet . \n = Not a heading = \n x \n",
    " = The ( = ) sign = \n \n = = = Deep = = = \n \n Text . \n",
]


@pytest.mark.parametrize("cut", [None, 3, 9, 10, 12])
@pytest.mark.parametrize("kind", ["wiki.train.raw", "lines.jsonl", "lines.parquet"])
def test_wikitext_articles_are_rebuilt_from_lines_also_across_shards(
    kind: str, cut: int | None, tmp_path: Path
) -> None:
    lines = " \n".join(["", *ARTICLES]).splitlines(keepends=True)
    for number, part in enumerate([lines] if cut is None else [lines[:cut], lines[cut:]]):
        file = tmp_path / f"{number}-{kind}"
        if kind == "wiki.train.raw":
            file.write_text("".join(part))
        else:
            write_rows(file, [{"text": line if line.strip() else ""} for line in part])
    found = documents(WikiText103(), tmp_path)
    assert [d.text.split() for d in found] == [article.split() for article in ARTICLES]
    assert found[0].id == f"0-{kind}:2" and all(d.problem is None for d in found)


def test_wikitext_files_of_one_article_each_stay_apart(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(f" = {name} title = \r\n \r\n text of {name}\r\n".encode())
    assert [d.id for d in documents(WikiText103(), tmp_path)] == ["a.txt:1", "b.txt:1", "c.txt:1"]
    (tmp_path / "b.txt").write_bytes(b"\xff\n = B = \n \n beta\n")
    read = documents(WikiText103(), tmp_path)
    assert any("beta" in d.text for d in read), "what follows a line that cannot be read is not lost"


def test_a_spoilt_line_spoils_its_article_only(tmp_path: Path) -> None:
    data = "\n".join(["", *ARTICLES]).encode().replace(b"A poet", b"A \xff")
    (tmp_path / "wiki.txt").write_bytes(data)
    found = documents(WikiText103(), tmp_path)
    assert [bool(d.problem) for d in found] == [False, True, False]
    assert found[1].problem is not None and "row 13" in found[1].problem and "UTF-8" in found[1].problem


def test_bookcorpus_takes_books_where_the_source_has_them(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("A line\nof text.\n\nA new paragraph.")
    rows = [{"doc_id": i // 3, "text": f"sentence {i} ."} for i in range(7)]
    write_rows(tmp_path / "by_id.parquet", rows)
    write_rows(tmp_path / "by_title.jsonl", [{"title": f"t{i}", "text": "whole book"} for i in range(2)])
    found = documents(BookCorpus(run_characters=1), tmp_path)
    assert [(d.id, d.text) for d in found] == [
        ("by_id.parquet:1", "sentence 0 .\nsentence 1 .\nsentence 2 .\n"),
        ("by_id.parquet:4", "sentence 3 .\nsentence 4 .\nsentence 5 .\n"),
        ("by_id.parquet:7", "sentence 6 .\n"),
        ("by_title.jsonl:1", "whole book\n"),
        ("by_title.jsonl:2", "whole book\n"),
        ("novel.txt", "A line\nof text.\n\nA new paragraph."),
    ]
    own = documents(BookCorpus(book_column="chapter"), write_rows(tmp_path / "own.jsonl", [
        {"chapter": c, "doc_id": 1, "text": c} for c in "aabb"
    ]))  # fmt: skip
    assert [d.text for d in own] == ["a\na\n", "b\nb\n"]


def test_a_bad_row_spoils_its_own_book_only(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"title": t, "text": t if t != "two" else None} for t in ("one", "two", "three")]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with file.open("a") as end:
        end.write('{"title": "four", "te\n' + json.dumps({"title": "five", "text": "five"}))
    found = documents(BookCorpus(), file)
    assert [(d.text, bool(d.problem)) for d in found] == [
        ("one\n", False), ("", True), ("three\n", False), ("", True), ("five\n", False)
    ]  # fmt: skip
    rows = [{"doc_id": i, "text": t} for i, t in ((1, "a"), (1, None), (1, "b"), (2, "c"))]
    found = documents(BookCorpus(), write_rows(tmp_path / "b.jsonl", rows))
    assert [(d.text, bool(d.problem)) for d in found] == [("a\nb\n", True), ("c\n", False)]
    nameless = write_rows(tmp_path / "c.jsonl", [{"title": None, "text": "x" * 40} for _ in range(20)])
    assert len(documents(BookCorpus(run_characters=100), nameless)) > 3, "no name is not a name"
    (tmp_path / "d.txt").write_bytes(b"one two\nbad \xff\nthree\n" * 20)
    found = documents(BookCorpus(run_characters=50), tmp_path / "d.txt")
    assert len(found) > 3 and all(d.id.startswith("d.txt:") for d in found), "still a list of sentences"


@pytest.mark.parametrize("kind", ["sentences.txt", "sentences.jsonl", "sentences.parquet"])
def test_bookcorpus_joins_sentences_to_runs(kind: str, tmp_path: Path) -> None:
    sentences = [f"sentence number {i:03d} ." for i in range(100)]  # 22 characters each, with the end of the line
    if kind.endswith("txt"):
        (tmp_path / kind).write_text("\n".join(sentences))
    else:
        write_rows(tmp_path / kind, [{"text": s} for s in sentences])
    runs = documents(BookCorpus(run_characters=640), tmp_path)
    assert "".join(run.text for run in runs).split("\n")[:-1] == sentences, "nothing lost, nothing twice"
    assert [run.text.count("\n") for run in runs] == [30, 30, 40], "a short rest joins the run before it"
    assert [run.text.count("\n") for run in documents(BookCorpus(run_characters=800), tmp_path)] == [37, 37, 26]
    write_rows(tmp_path / "z.jsonl", [{"text": "x" * 50}, {"text": "y" * 700}, {"text": "z" * 400}])
    assert [len(d.text) for d in documents(BookCorpus(run_characters=600), tmp_path / "z.jsonl")] == [51, 701, 401]


# ---- text that cannot be used -----------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_bad_documents_stop_the_run_or_are_counted(
    cache: bool, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "v.txt").write_text(text(100))
    rows: list[dict[str, Any]] = [{"text": text(50, i)} for i in range(6)]
    file = write_rows(tmp_path / "train" / "books.jsonl", rows)
    cases = {
        "{cut": "not a row of JSON",
        '{"text": " "}': "it is empty",
        '{"text": "kan los"}': "fewer than one chunk",
    }
    for line, reason in cases.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]) + line + "\n" + json.dumps(rows[3]))
        data = PG19(**settings(tmp_path, tiny_backbone, cache=cache))
        with pytest.raises(UserError, match=f"train/books.jsonl:4 .*{reason}.*--data.on_bad_document skip"):
            data.setup("fit")
            list(data.train_dataloader())
        skipping = PG19(**settings(tmp_path, tiny_backbone, cache=cache, on_bad_document="skip", shuffle=False))
        skipping.setup("fit")
        capsys.readouterr() if not cache else None
        read = [skipping.document_name("train", int(b["document_id"][0])) for b in skipping.train_dataloader()]
        assert sorted(set(read)) == [f"train/books.jsonl:{i}" for i in (1, 2, 3, 5)]
        skipping.teardown("fit")
        told = capsys.readouterr().out
        assert "1 that cannot be used left out" in told if cache else "left out: 1 that could not be used" in told


def test_short_documents_are_left_out_only_if_that_was_asked_for(tmp_path: Path, tiny_backbone: Path) -> None:
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        write_rows(tmp_path / part / "a.jsonl", [{"text": text(n, len(part))} for n in (3, 100, 20, 40)])
    for cache in (True, False):
        data = PG19(**settings(tmp_path, tiny_backbone, cache=cache, min_document_tokens=30))
        data.setup("fit")
        assert sum(int(b["length"]) for b in data.val_dataloader()) == 140
        whole = PG19(**settings(tmp_path, tiny_backbone, cache=cache, on_bad_document="skip"))
        whole.setup("fit")
        assert sum(int(b["length"]) for b in whole.val_dataloader()) == 160
        longest = PG19(**settings(tmp_path, tiny_backbone, cache=cache, min_document_tokens=30, max_document_tokens=50))
        longest.setup("fit")
        assert sum(int(b["length"]) for b in longest.val_dataloader()) == 90


def test_a_source_without_splits_is_split_the_same_way_from_the_cache_and_streaming(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    write_rows(tmp_path / "books.jsonl", [{"text": text(40 + i, i)} for i in range(60)])
    parts: list[dict[str, set[str]]] = []
    for cache in (True, False):
        data = BookCorpus(**settings(tmp_path, tiny_backbone, cache=cache, validation_fraction=0.2, run_characters=10))
        data.setup("fit")
        data.setup("test")
        loaders = {
            "train": data.train_dataloader(),
            "validation": data.val_dataloader(),
            "test": data.test_dataloader(),
        }
        parts.append(
            {p: {data.document_name(p, int(b["document_id"][0])) for b in loader} for p, loader in loaders.items()}
        )
    assert parts[0] == parts[1] and sum(map(len, parts[0].values())) == 60


def test_splits_can_be_given_one_by_one_and_named(tmp_path: Path, tiny_backbone: Path) -> None:
    for name in ("x", "y"):
        write_rows(tmp_path / f"{name}.jsonl", [{"body": text(40, i)} for i in range(3)])
    path = {"train": str(tmp_path / "x.jsonl"), "held": [str(tmp_path / "y.jsonl")]}
    data = PG19(**settings(path, tiny_backbone, validation_split="held", text_column="body"))
    data.setup("fit")
    assert {data.document_name("validation", int(b["document_id"][0])) for b in data.val_dataloader()} == {
        f"y.jsonl:{i}" for i in (1, 2, 3)
    }
    with pytest.raises(UserError, match="data.path: held is no split. Allowed: train, validation, test"):
        PG19(**settings(path, tiny_backbone)).setup("fit")


def test_a_hub_data_set_is_split_by_its_own_splits_or_by_hash(tmp_path: Path, tiny_backbone: Path) -> None:
    for split in ("train", "validation"):
        folder = tmp_path / "both" / split
        folder.mkdir(parents=True)
        write_rows(folder / "0.parquet", [{"text": f"{text(40, i)} {split}"} for i in range(30)])
    (tmp_path / "one" / "train").mkdir(parents=True)
    write_rows(tmp_path / "one" / "train" / "0.parquet", [{"text": text(40, i)} for i in range(30)])
    more: dict[str, Any] = {"validation_fraction": 0.2}
    own = PG19(**settings(None, tiny_backbone, hub_id=str(tmp_path / "both"), **more))
    own.setup("fit")
    assert sum(int(b["document_start"].sum()) for b in own.train_dataloader()) == 30
    with pytest.raises(UserError, match="no test split. Allowed: train, validation"):
        own.setup("test")
    with pytest.raises(UserError, match="data.test_split='held'.*Allowed: train, validation"):
        PG19(**settings(None, tiny_backbone, hub_id=str(tmp_path / "both"), test_split="held", **more)).setup("test")
    one = PG19(**settings(None, tiny_backbone, hub_id=str(tmp_path / "one"), **more))
    one.setup("fit")
    one.setup("test")
    loaders = (one.train_dataloader(), one.val_dataloader(), one.test_dataloader())
    counts = [sum(int(b["document_start"].sum()) for b in loader) for loader in loaders]
    assert sum(counts) == 30 and all(counts)
    kept = PG19(**settings(None, tiny_backbone, hub_id=str(tmp_path / "both"), cache=True, **more))
    kept.setup("fit")
    assert sum(int(b["document_start"].sum()) for b in kept.val_dataloader()) == 30


def test_tokens_are_the_tokenizer_s_own(tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    texts = ["kan los <unk> zzz <pad>", "", text(3000)]
    tokenizer("x", truncation=True, max_length=4, padding="max_length")  # leaves the backend set to cut and to pad
    found = tokenise(tokenizer, texts)
    assert [ids.tolist() for ids in found] == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenise(tokenizer, []) == []


def test_files_of_the_same_name_are_all_read(tmp_path: Path, tiny_backbone: Path) -> None:
    for corpus in "AB":
        for part in ("train", "validation"):
            (tmp_path / corpus / part).mkdir(parents=True)
            (tmp_path / corpus / part / "x.txt").write_text(text(40, ord(corpus) + len(part)))
    both = [str(tmp_path / corpus) for corpus in "AB"]
    data = PG19(**settings(both, tiny_backbone))
    data.setup("fit")
    names = {data.document_name("train", int(b["document_id"][0])) for b in data.train_dataloader()}
    assert names == {str(tmp_path / corpus / "train" / "x.txt") for corpus in "AB"}


def test_what_was_left_out_is_told_for_a_whole_epoch(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        write_rows(tmp_path / part / "a.jsonl", [{"text": text(n, len(part))} for n in (3, 100, 3, 40)])
    data = PG19(**settings(tmp_path, tiny_backbone, min_document_tokens=30))
    data.setup("fit")
    for _ in data.train_dataloader():
        pass
    next(iter(data.train_dataloader()))
    data.teardown("fit")
    assert "train: 4 documents read; left out: 2 shorter than 30 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("cache", [True, False])
def test_documents_are_judged_before_they_are_cut(cache: bool, tmp_path: Path, tiny_backbone: Path) -> None:
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.txt").write_text(text(100, len(part)))
    data = PG19(**settings(tmp_path, tiny_backbone, cache=cache, max_document_tokens=10))
    data.setup("fit")
    assert [int(b["length"]) for b in data.val_dataloader()] == [10]


def test_a_cache_goes_to_another_process_as_a_name(tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    cache = build([Document("a", text(5000))], tokenizer, "pickled")
    sent = pickle.dumps(cache)
    assert len(sent) < 2000 and pickle.loads(sent).tokens(0, 0, 9).tolist() == cache.tokens(0, 0, 9).tolist()


# ---- the cache --------------------------------------------------------------------------------------------


def build(documents: list[Document], tokenizer: Any, source: str = "s") -> TokenCache:
    return TokenCache.build("t", source, lambda: documents, tokenizer)


def test_cache_is_keyed_by_text_and_tokenizer_and_survives_a_kill(tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    a = build([Document("a", "kan los")], tokenizer, "first")
    b = build([Document("a", "kan nex")], tokenizer, "second")
    assert a.tokens(0, 0, 9).tolist() == tokenizer("kan los")["input_ids"] != b.tokens(0, 0, 9).tolist()
    assert build([], tokenizer, "first").tokens(0, 0, 9).tolist() == a.tokens(0, 0, 9).tolist(), "found, not made again"

    def killed() -> Iterator[Document]:
        yield Document("a", "los")
        raise KeyboardInterrupt

    texts = [Document("a", "los los")]
    with pytest.raises(KeyboardInterrupt):
        TokenCache.build("t", "third", killed, tokenizer)
    assert build(texts, tokenizer, "third").tokens(0, 0, 9).tolist() == tokenizer("los los")["input_ids"]


def test_of_two_builders_the_second_waits_and_finds_the_work_done(tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    begun, go, calls = threading.Event(), threading.Event(), []

    def slow() -> Iterator[Document]:
        calls.append(1)
        begun.set()
        assert go.wait(10)
        yield Document("a", "kan los")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(TokenCache.build, "t", "pair", slow, tokenizer)
        assert begun.wait(10)
        second = pool.submit(TokenCache.build, "t", "pair", slow, tokenizer)
        time.sleep(0.2)
        assert not second.done()
        go.set()
        assert first.result().ids == second.result().ids == ["a"] and len(calls) == 1


def test_what_a_killed_builder_left_is_cleared_away(tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    name = build([Document("a", "kan los")], tokenizer, "left").name
    folder = cache_dir() / "tokens"
    shutil.rmtree(folder / name)
    (folder / f".{name}-half").mkdir()
    (folder / f".{name}-half" / "tokens.bin").write_bytes(b"123")
    assert len(build([Document("a", "kan los")], tokenizer, "left")) == 1
    assert not list(folder.glob(f".{name}-*"))


def test_a_changed_file_is_tokenised_again(tmp_path: Path, tiny_backbone: Path) -> None:
    def validation() -> list[int]:
        data = LocalText(**settings(tmp_path, tiny_backbone, split="all"))
        data.setup("validate")
        return [int(x) for b in data.val_dataloader() for x in b["input_ids"][0, : int(b["length"])]]

    (tmp_path / "a.txt").write_text(text(40, 1))
    first = validation()
    (tmp_path / "a.txt").write_text(text(40, 2))
    assert validation() != first and len(validation()) == 40


def test_a_damaged_or_foreign_cache_is_told(tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    cache = build([Document("a", "kan los mith")], tokenizer, "damaged")
    folder = cache_dir() / "tokens" / cache.name
    facts = json.loads((folder / "documents.json").read_text())
    (folder / "documents.json").write_text(json.dumps(facts | {"tokenizer": "other"}))
    with pytest.raises(UserError, match="made with another tokenizer.*delete that folder"):
        build([], tokenizer, "damaged")
    (folder / "documents.json").write_text(json.dumps(facts))
    (folder / "tokens.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="damaged.*1 tokens of 3.*delete that folder"):
        build([], tokenizer, "damaged")
