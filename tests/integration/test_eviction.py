"""Eviction: replays against reading, and the whole evaluation through train.py."""

import csv
import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_memlong import MemLong
from lightning_memlong.cli.main import main
from lightning_memlong.evaluation.eviction_replay import Replay, from_everything
from tests.integration.helpers import EVAL, found_in, rows_of, tiny

POLICIES: list[dict[str, Any]] = [
    {"policy": "retrieval_frequency"},
    {"policy": "retrieval_frequency", "policy_args": {"drop_oldest": 0.0}, "half_life": 8.0},
    {"policy": "lru"},
    {"policy": "score", "policy_args": {"target_fill": 0.8}},
    {"policy": "retrieval_frequency", "use": "attention"},
]


@pytest.fixture(scope="module")
def book(text_folder: Path) -> str:
    return " ".join(f.read_text() for f in sorted(text_folder.glob("*.txt")))[:1900]


@pytest.mark.parametrize("fields", POLICIES)
def test_a_replay_keeps_what_reading_keeps(fields: dict[str, Any], byte_backbone: Path, book: str) -> None:
    """The same entries with the same counters, as a book that is read into a bank of that capacity leaves them."""
    settings = {"chunk_size": 16, "capacity": 256, "top_k": 2, "retriever": {"name": "hashing"}, **fields}
    # What the memory layer stores does not depend on what is retrieved there and above.
    model = MemLong.from_pretrained(byte_backbone, settings, memory_layer=1, source="single", retrieval_layers=[1, 3])
    model.eval()
    read = model.read(book, window=64, capacity=256, progress=False)
    everything = model.read(book, window=64, progress=False)
    data = SimpleNamespace(window=64, stride=48)
    subject: Any = SimpleNamespace(
        model=model, data=data, tokenizer=model.retrieval.tokenizer, device=torch.device("cpu"), autocast=nullcontext
    )
    tokens = np.asarray(model.retrieval.tokenizer(book)["input_ids"])
    replay = Replay(subject, model.retrieval, everything, tokens, 0)
    dropped: list[torch.Tensor] = []
    for batch in replay.batches():
        replay.store(batch, replay.retrieve(batch))
        dropped += [entries.counters for entries in replay.bank.evicted]
    mine, theirs = replay.bank.entries(0), read.entries(0)
    for name in ("positions", "lengths", "born", "used", "embeddings"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    for name in ("counters", "scores"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)
    assert replay.evictions == read.evictions == sum(map(len, dropped)) > 20
    assert replay.used == sum(int((counters > 0).sum()) for counters in dropped) > 0
    gone = {*range(0, len(tokens), 16)} - {*mine.positions.tolist()}
    assert all(replay.holds((p, p + 3)) for p in mine.positions.tolist())
    assert gone and not any(replay.holds((p, p + 3)) for p in gone)


def test_what_a_small_bank_found_is_read_from_the_one_that_has_everything(byte_backbone: Path, book: str) -> None:
    settings = {"chunk_size": 16, "capacity": 256, "top_k": 3, "retriever": {"name": "hashing"}}
    model = MemLong.from_pretrained(byte_backbone, settings, memory_layer=1)
    read, everything = (model.read(book, window=64, capacity=c, progress=False) for c in (256, None))
    found = read.gather(torch.tensor([[-1, 5, 2]]), torch.tensor([[float("nan"), 0.5, 0.7]]))
    record = from_everything(everything, found)
    assert found is not None and record is not None
    for name in ("entries", "positions", "mask"):
        assert torch.equal(getattr(record, name), getattr(found, name)), name
    assert record.scores[0, 1:].tolist() == pytest.approx([0.7, 0.5])
    first = int(read.entries(0).positions[2]) // 16
    expected = everything.gather(torch.tensor([[first]]), count=False)
    assert expected is not None and torch.equal(record.keys[..., 16:32, :], expected.keys)
    assert from_everything(everything, None) is None


def eviction(byte_backbone: Path, text_folder: Path, tmp_path: Path, *more: str) -> list[str]:
    folder = tmp_path / "book"
    folder.mkdir(exist_ok=True)
    (folder / "book.txt").write_text(" ".join(f.read_text() for f in sorted(text_folder.glob("*.txt")))[:8000])
    small = tiny(byte_backbone, folder, tmp_path / "runs")
    return ["test", *small, "--config", str(EVAL / "eviction.yaml"), "--data.window", "64", "--data.stride", "48",
            "--memory.top_k", "2", "--memory.retriever.name", "bm25", "--evaluation.length", "6400",
            "--evaluation.capacities", "[128, 256]", "--evaluation.documents", "1", "--evaluation.windows", "2",
            "--evaluation.facts", "2", "--evaluation.asked_every", "144", *more]  # fmt: skip


@pytest.mark.long
def test_eviction(byte_backbone: Path, text_folder: Path, tmp_path: Path) -> None:
    policies = {"fifo": {"policy": "fifo"}, "attention": {"use": "attention", "policy_args": {"drop_oldest": 0.0}}}
    options = eviction(byte_backbone, text_folder, tmp_path, "--evaluation.policies", json.dumps(policies))
    assert main(options) == 0
    rows = rows_of(options)
    assert len(rows) == 2 * (2 + 2) + 4 * (2 + 1 + 4), "off and everything; two policies of two capacities"
    windows = [r for r in rows if r["what"] == "window"]
    assert {r["place"] for r in windows if r["policy"] == "fifo"} == {r["place"] for r in windows}
    assert all(r["place"] - 48 >= 3200 and r["tokens"] == 48 for r in windows)
    facts = {(r["policy"], r["capacity"], r["what"], r["place"]): r for r in rows if r["what"] in ("asked", "silent")}
    for policy, size, number in itertools.product(policies, (128, 256), (0, 1)):
        asked, silent = (facts[policy, size, what, number] for what in ("asked", "silent"))
        assert asked["asked"] > 10 and silent["asked"] == 0
        assert asked["hit"] <= asked["kept"] and silent["hit"] <= silent["kept"]
        assert policy != "fifo" or not (asked["kept"] or silent["kept"]), "fifo forgets what is old"
    assert facts["attention", 256, "asked", 0]["kept"] == 1, "what is used stays"
    assert "kept" not in facts["off", 0, "silent", 0] and facts["everything kept", 0, "silent", 0]["hit"] == 1
    churn = {(r["policy"], r["capacity"]): r for r in rows if r["what"] == "churn"}
    assert all(churn["fifo", c]["evictions"] + churn["fifo", c]["entries"] == 6400 // 16 for c in (128, 256))
    assert churn["fifo", 128]["reach"] < churn["fifo", 256]["reach"] <= 256
    folder = found_in(options, "eviction.md").parent
    assert "asked: kept [%]" in (folder / "eviction.md").read_text() and (folder / "eviction-capacity.png").exists()
    with (folder / "eviction.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["by_everything"]) for r in table if r["policy"] == "everything kept"] == [1.0]
    before = found_in(options, "*.jsonl").read_bytes()
    assert main(options) == 0 and found_in(options, "*.jsonl").read_bytes() == before


@pytest.mark.long
def test_without_a_model_the_same_is_kept_and_found(
    byte_backbone: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = {"lru": {"policy": "lru"}, "attention": {"use": "attention"}}
    options = eviction(byte_backbone, text_folder, tmp_path, "--evaluation.policies", json.dumps(policies))
    assert main(options) == 0
    seen = ("policy", "capacity", "what", "place", "wanted", "there", "kept", "hit", "asked", "evictions", "used",
            "entries", "reach")  # fmt: skip

    def kept() -> list[dict[str, Any]]:
        return [{k: r[k] for k in seen if k in r} for r in rows_of(options)
                if r["policy"] == "lru" or (r["policy"] == "everything kept" and r["what"] == "silent")]  # fmt: skip

    with_model = kept()
    capsys.readouterr()
    assert main([*options, "--evaluation.with_model", "false"]) == 0
    assert kept() == with_model and len(with_model) == 2 + 2 * (2 + 1 + 4)
    assert all("nll" not in r and r["policy"] in ("lru", "everything kept") for r in rows_of(options))
    told = capsys.readouterr().out
    assert "Left out, since use by attention takes a model: attention." in told and "perplexity" not in told


@pytest.mark.long
def test_bad_evictions_are_told(
    byte_backbone: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = eviction(byte_backbone, text_folder, tmp_path)
    for more, told in (
        (["--evaluation.capacities", "[6400]"], "evaluation.capacities=[6400]"),
        (["--evaluation.capacities", "[48]"], "at least 64 for the window"),
        (["--evaluation.length", "6401"], "evaluation.length=6401 cannot be used. Allowed: a multiple of 16"),
        (["--evaluation.length", "160000"], "evaluation.length=160000 cannot be used. Allowed: at most"),
        (["--evaluation.policies", "{all: {policy: none}}"], "evaluation.policies.all='none'"),
        (["--evaluation.policies", "{mine: {policy: nowhere.policy}}"], "memory.policy='nowhere.policy' is unknown"),
        (["--evaluation.policies", "{mine: {top_k: 4}}"], "evaluation.policies.mine=['top_k']"),
        (["--evaluation.facts", "90"], "evaluation.facts=90"),
        (["--memory.granularity", "chunk"], "memory.granularity='chunk'"),
        (["--memory.retriever.name", "hidden", "--evaluation.with_model", "false"], "evaluation.with_model=False"),
        (["--memory.use", "attention", "--evaluation.with_model", "false", "--evaluation.policies", "{lru: {}}"],
         "Allowed: one by retrieval, without a model"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main([*options, *more]) == 2
        assert told in capsys.readouterr().err, told
