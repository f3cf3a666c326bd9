"""RULER through train.py on a tiny model; and its banks and answers against plain reading."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lightning_memlong import MemLong, UserError
from lightning_memlong.cli.main import main
from lightning_memlong.evaluation import Subject
from lightning_memlong.evaluation.alternatives import open_alternatives
from lightning_memlong.evaluation.parts import units_of
from lightning_memlong.evaluation.scoring import read_documents
from lightning_memlong.retrieval import retrieve_for
from tests.integration.helpers import EVAL, found_in, rows_of, tiny

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")
from lightning_memlong.lm_eval import Ruler  # noqa: E402
from lightning_memlong.lm_eval.answering import prompted  # noqa: E402
from lightning_memlong.lm_eval.ruler_reading import SharedReading  # noqa: E402
from lightning_memlong.lm_eval.ruler_ways import Asked, open_ways  # noqa: E402
from tests.few_words import import_few_words  # noqa: E402

MEMORY: dict[str, Any] = {"chunk_size": 16, "top_k": 2, "retriever": {"name": "hashing"}}


class Counter:
    """Progress that counts."""

    def __init__(self) -> None:
        self.tokens = 0

    def begin(self, total: int, what: str) -> None:
        self.tokens = 0

    def advance(self, tokens: int) -> None:
        self.tokens += tokens


@pytest.fixture(scope="module", autouse=True)
def few_words() -> None:
    import_few_words()  # all of RULER's tasks import the module of needles


@pytest.fixture(scope="module")
def model(byte_backbone: Path) -> MemLong:
    return MemLong.from_pretrained(byte_backbone, MEMORY, memory_layer=1)


@pytest.fixture
def subject(model: MemLong, byte_backbone: Path) -> Subject:
    retrieval = model.retrieval
    return Subject(
        model, retrieval.tokenizer, retrieval.config, SimpleNamespace(window=64, batch_size=1), str(byte_backbone),
        lambda *_: None, Counter(), nullcontext, retrieval.retriever,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2])
def test_what_documents_begin_with_in_common_is_read_once(rows: int, subject: Subject) -> None:
    """And leaves in the bank what each of them leaves that is read by itself."""
    mixer = np.random.default_rng(0)
    start = mixer.integers(1, 256, 300)
    documents = [np.concatenate([start[:cut], mixer.integers(1, 256, 320 - cut)]) for cut in (0, 0, 130, 130, 260, 300)]
    documents[1] = documents[0]
    retrievals = [subject.retrieval(), subject.retrieval({"retriever": {"name": "bm25"}})]
    read: list[int] = []
    capture = subject.model.capture
    subject.model.capture = lambda ids, *args: read.append(ids.shape[1]) or capture(ids, *args)  # type: ignore[method-assign, func-returns-value, assignment]
    reading = SharedReading(subject, retrievals, 64, rows, 320)
    for at in range(0, len(documents), rows):
        group = documents[at : at + rows]
        shared = reading.read(group)
        windows, read[:] = len(read), []
        for one, bank in zip(read_documents(subject, retrievals, group, 64), shared, strict=True):
            for row in range(len(group)):
                a, b = one.entries(row), bank.entries(row)
                assert a.positions.tolist() == b.positions.tolist() and torch.equal(a.embeddings, b.embeddings)
                which = torch.arange(len(a))[None]
                c, d = (v.view(row).gather(which[None], count=False) for v in (one, bank))
                assert c is not None and d is not None
                assert torch.equal(c.keys, d.keys) and torch.equal(c.values, d.values)
                assert one.row(row).tokens.tolist() == bank.row(row).tokens.tolist()
        if rows == 1:  # of seven windows; the last one is not whole, and read again
            assert windows == (7, 1, 7, 5, 5, 2)[at]
        read.clear()
    del subject.model.capture  # type: ignore[method-assign]


def test_answers_after_one_prompt_are_those_of_the_whole_text(subject: Subject) -> None:
    model = subject.model
    mixer = np.random.default_rng(1)
    tokens = mixer.integers(1, 256, 320)
    bank = read_documents(subject, [model.retrieval], [tokens[:256]], 64)[0]
    local, question = tokens[256:300].tolist(), "kan lor"
    memory = retrieve_for(model.retrieval, bank, [model.long_context.embed_texts([question])[0][None]])
    held = len(bank.entries(0))
    with prompted(model.long_context, bank, local, question, 64) as prompt:
        for answer in ([5, 9, 200], [77], [5, 9, 200]):
            losses, likeliest = prompt.score(answer)
            with torch.no_grad():
                logits = model(torch.tensor([[*local, *answer]]), memory=memory).logits[0, len(local) - 1 : -1]
            wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
            torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
            assert likeliest.tolist() == (logits.argmax(-1) == torch.tensor(answer)).tolist()
        stored = bank.insertions
        long = prompt.write(max_new_tokens=40, do_sample=False)  # moves into the bank on the way
        assert bank.insertions > stored and len(bank.entries(0)) == held, "and is taken out, for the next answer"
        assert prompt.write(max_new_tokens=40, do_sample=False) == long
        places = {(start, start + 16) for start in memory.positions[0].tolist()}  # type: ignore[union-attr]
        assert set(prompt.retrieved()) == places
    assert len(bank.entries(0)) == held
    with prompted(model.long_context, bank, local, question, 64) as prompt:
        assert prompt.write(max_new_tokens=40, do_sample=False) == long
        assert prompt.write([long[3:5]], max_new_tokens=40, do_sample=False) == long[: long.index(long[3:5])]


@pytest.mark.parametrize("kind", ["trained_window", "yarn", "dynamic_ntk"])
def test_what_could_be_done_instead_answers_as_it_predicts(kind: str, subject: Subject) -> None:
    """Losses of an answer are those that the perplexity grid has for its tokens; and writing goes on from there."""
    longest = 128
    subject.model.config.max_position_embeddings, was = longest, subject.model.config.max_position_embeddings
    tokens = np.random.default_rng(2).integers(1, 256, 320)
    answer = [5, 9, 200]
    try:
        ways, _ = open_ways(subject, {}, [kind], 4096)
        (title,) = [name for name in ways if name != "off"]
        document: Any = SimpleNamespace(question="kan lor")
        asked = Asked(document, tokens, 256, 3, answer, answer, [])
        with ways[title].answers(asked, None, 0) as answers:
            losses, _ = answers.score(answer)
            assert torch.equal(answers.score(answer)[0], losses) and answers.retrieved() == []
            text, again = (answers.write(max_new_tokens=30, do_sample=False) for _ in range(2))
        alternative = open_alternatives([kind], subject, longest, 0, 32)[title]
        wanted = alternative.losses(subject, np.concatenate([tokens, answer]), 3, [])
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
        assert text == again
    finally:
        subject.model.config.max_position_embeddings = was


def test_a_window_that_slides_over_a_prompt_keeps_its_end(subject: Subject) -> None:
    """All but a quarter of the window is there when the answer begins, as if the text had always been read so."""
    tokens, answer = np.random.default_rng(3).integers(1, 256, 320), [5, 9]
    ways, _ = open_ways(subject, {}, ["sinks"], 4096)
    asked = Asked(SimpleNamespace(question="kan"), tokens, 256, 2, answer, answer, [])  # type: ignore[arg-type]
    with ways["4 sinks and window"].answers(asked, None, 0) as answers:
        losses, _ = answers.score(answer)
    other = tokens.copy()
    other[320 - 64 + 16 + 8 : 320 - 20] = 7
    with ways["4 sinks and window"].answers(replace(asked, tokens=other), None, 0) as answers:
        assert not torch.allclose(answers.score(answer)[0], losses, atol=1e-3), "the last 48 tokens are seen"
    assert ways["4 sinks and window"].held(320) * 64 == ways["off"].held(320) * 68


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def ruler(byte_backbone: Path, text_folder: Path, tmp_path: Path, *more: str) -> list[str]:
    small = tiny(byte_backbone, text_folder, tmp_path / "runs")
    return ["test", *small, "--config", str(EVAL / "ruler.yaml"), "--data.window", "512", "--memory.chunk_size", "32",
            "--memory.top_k", "3", "--memory.capacity", "1024", "--evaluation.tasks", "[fwe]", "--evaluation.lengths",
            "[1024, 1536]", "--evaluation.samples", "1", *more]  # fmt: skip


def test_ruler(byte_backbone: Path, text_folder: Path, tmp_path: Path) -> None:
    options = ruler(byte_backbone, text_folder, tmp_path, "--evaluation.alternatives", "[sinks, prompt, yarn]")
    assert main(options) == 0
    rows = rows_of(options)
    settings = {"off", "similarity", "random", "4 sinks and window", "chunks in the prompt"}
    assert len(rows) == 2 * 5 and {r["setting"] for r in rows} == settings, "yarn: nothing is to be stretched"
    for r in rows:
        assert r["memory"] % 32 == 0 and r["prompt"] - r["memory"] <= 512 - 50 and r["prompt"] <= r["length"]
        assert 0 <= r["right_tokens"] <= r["tokens"] == 21 and "needles" not in r
    off = {(r["length"], r["sample"]): r["nll"] for r in rows if r["setting"] == "off"}
    assert all(r["nll"] != off[r["length"], r["sample"]] for r in rows if r["setting"] == "similarity")
    cost = {r["setting"]: (r["held"], r["seconds"]) for r in rows if r["length"] == 1536}
    assert cost["off"] < cost["4 sinks and window"] and cost["off"] < cost["similarity"]
    assert cost["off"][0] * (512 + 3 * 32) / 512 == cost["chunks in the prompt"][0]
    assert "| 1,536 | random |" in (page := found_in(options, "ruler.md").read_text()) and "time [s]" in page
    assert found_in(options, "ruler-ruler.png").exists()
    file = found_in(options, "*.jsonl")
    file.write_text("".join(json.dumps(r) + "\n" for r in rows[:4]))
    assert main(options) == 0
    assert [untimed(r) for r in rows_of(options)] == [untimed(r) for r in rows], "it goes on with the fifth"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tasks": ["niah"]}, "evaluation.tasks='niah' cannot be used. Allowed: one of niah_single_1"),
        ({"tasks": []}, "at least one of niah_single_1"),
        ({"lengths": [512, 4096]}, "1024 or more tokens each"),
        ({"samples": 0}, "evaluation.samples=0"),
        ({"seed": -1}, "evaluation.seed=-1"),
        ({"settings": {"off": {}}}, "evaluation.settings=.'off'.* names of their own"),
        ({"settings": {"x": {"capacity": 64}}}, "evaluation.settings.x=.'capacity'.*--memory"),
        ({"settings": {"x": {"topk": 64}}}, "evaluation.settings.x.topk=64"),
        ({"tasks": ["qa_1"]}, "evaluation.squad=None.*we are offline"),
        ({"lengths": [1024], "window": 1024}, "data.window=1024.*less than the longest of .1024."),
        ({"window": 256}, "data.window=256 cannot be used. Allowed: more than the"),
        ({"window": 500}, "window=500 cannot be used. Allowed: a multiple of memory.chunk_size=16"),
        ({"chat": True}, "a backbone with a chat template"),
    ],
)
def test_bad_input_is_told(
    options: dict[str, Any], told: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subject.data.window = options.pop("window", 512)
    with pytest.raises(UserError, match=told):
        Ruler(**({"tasks": ["fwe"], "samples": 1} | options)).prepare(subject)


def test_parts_share_out_documents_which_are_read_once(subject: Subject) -> None:
    subject.data.window = 512
    ruler = Ruler(["fwe"], [1024], samples=2, alternatives=["sinks", "prompt"])
    ruler.prepare(subject)
    assert len(ruler.planned()) == 2 * 5 and list(units_of(ruler)) == [("fwe", 1024, 0), ("fwe", 1024, 1)]


def test_a_tokenizer_that_does_not_know_the_words_is_told(subject: Subject, tiny_backbone: Path) -> None:
    subject.tokenizer, subject.data.window = AutoTokenizer.from_pretrained(tiny_backbone), 512
    with pytest.raises(UserError, match="the words and numbers of fwe"):
        Ruler(["fwe"], [2048], samples=1).prepare(subject)


@pytest.mark.long
def test_a_mistake_is_told_in_a_line(
    byte_backbone: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ruler(byte_backbone, text_folder, tmp_path, "--evaluation.tasks", "[niah_single_2]")
    assert main([*options, "--evaluation.haystack", str(tmp_path / "none.txt")]) == 2
    assert "error: evaluation.haystack=" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.jsonl"))


@pytest.mark.long
def test_needles_are_found_where_they_are(byte_backbone: Path, text_folder: Path, tmp_path: Path) -> None:
    """Those of a text, by the words of the question; and a setting of another encoder finds others."""
    text = tmp_path / "haystack.txt"
    text.write_text(" ".join(f"Sentence {n} is about nothing." for n in range(400)))
    settings = {"bm25": {"retriever": {"name": "bm25"}}, "hashing": {}, "random": {"selection": "random"}}
    more = ["--evaluation.tasks", "[niah_single_2, niah_multivalue]", "--evaluation.haystack", str(text),
            "--evaluation.settings", json.dumps(settings), "--evaluation.lengths", "[4096]", "--data.batch_size", "2",
            "--data.window", "1024", "--memory.chunk_size", "128", "--evaluation.samples", "3"]  # fmt: skip
    options = ruler(byte_backbone, text_folder, tmp_path, *more)
    assert main(options) == 0
    found = [r for r in rows_of(options) if r["setting"] == "bm25" and r.get("needles")]
    assert found and all(r["retrieved"] == r["needles"] for r in found if r["task"] == "niah_single_2")
    tokenizer = AutoTokenizer.from_pretrained(byte_backbone)
    assert len(tokenizer("1234567")["input_ids"]) == 7 and {r["tokens"] for r in found if r["answers"] == 1} == {8}
    page = found_in(options, "ruler.md").read_text()
    assert "niah_single_2 (RULER-style)" in page and "bm25" in page
