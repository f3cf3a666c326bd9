"""Evaluations through train.py: against transformers alone, resumed, and told what is wrong."""

import csv
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_memlong.cli.main import main
from lightning_memlong.evaluation.window_scorer import WindowScorer
from tests.integration.helpers import EVAL, ROOT, found_in, rows_of, tiny

SETTING = "--evaluation.settings"


@pytest.fixture
def options(byte_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    """A perplexity grid of seconds: windows of 64 and contexts of up to 512 bytes."""
    small = tiny(byte_backbone, text_folder, tmp_path / "runs")
    grid = ["--config", str(EVAL / "perplexity.yaml"), "--data.window", "64", "--data.stride", "32",
            "--data.split", "all", "--memory.query_chunks", "2", "--memory.top_k", "3",
            "--evaluation.lengths", "[48, 64, 256, 512]", "--evaluation.documents", "3",
            "--evaluation.windows", "4"]  # fmt: skip
    return ["test", *small, *grid]


def option(options: list[str], name: str) -> str:
    return options[options.index(name) + 1]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("document", "window", "length", "setting"))


# ---- perplexity -------------------------------------------------------------------------------------------


def test_plain_cells_are_what_transformers_alone_computes(
    options: list[str], byte_backbone: Path, tmp_path: Path
) -> None:
    """In texts that spell a special token, which is text to both."""
    texts = {p.name: p.read_text().replace(" ka", " <pad>") for p in Path(option(options, "--data.path")).iterdir()}
    (spelled := tmp_path / "spelled").mkdir()
    for name, text in texts.items():
        (spelled / name).write_text(text)
    peer = ["--evaluation.peers", json.dumps({"plain": str(byte_backbone)}), "--data.path", str(spelled)]
    assert main([*options, *peer]) == 0
    rows = rows_of(options)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(byte_backbone), AutoTokenizer.from_pretrained(byte_backbone)
    compared = set()
    for row in rows:
        if row["setting"] not in ("off", "longer window", "plain"):
            continue
        local = {
            "off": min(row["length"], 64),
            "longer window": min(row["length"], 64 + 3 * 16),
            "plain": row["length"],
        }
        ids = torch.tensor([tokenizer(texts[row["document"]], split_special_tokens=True)["input_ids"]])
        window = ids[:, row["window"] - local[row["setting"]] : row["window"]]
        with torch.no_grad():
            log_p = model(window).logits.log_softmax(-1)[0, :-1]
        losses = -log_p.gather(1, window[0, 1:, None])[-32:]
        assert row["tokens"] == 32 == row["bytes"]
        assert row["nll"] / 32 == pytest.approx(float(losses.mean()), rel=1e-4)
        compared.add((row["setting"], row["length"]))
    assert {length for setting, length in compared if setting == "plain"} == {48, 64, 256, 512}
    assert ("off", 512) in compared and ("longer window", 256) in compared


def test_every_cell_scores_the_same_tokens_and_each_of_them_once(options: list[str]) -> None:
    assert main(options) == 0
    rows = rows_of(options)
    assert len({key(r) for r in rows}) == len(rows)
    cells: dict[tuple[str, int], set[tuple[str, int]]] = {}
    for row in rows:
        cells.setdefault((row["setting"], row["length"]), set()).add((row["document"], row["window"]))
    assert len({frozenset(places) for places in cells.values()}) == 1
    places = sorted(next(iter(cells.values())))
    assert len(places) == 12 and all(end >= 512 for _, end in places)
    for (document, end), (other, after) in zip(places, places[1:], strict=False):
        assert document != other or after - end >= 32, "scored stretches of 32 tokens do not overlap"
    assert {s for s, length in cells if length == 512} == {
        "off", "longer window", "retrieved", "the most similar alone", "without learned biases", "nearest of last 4",
        "recent", "random", "current (LEAKS)"}  # fmt: skip
    assert {s for s, length in cells if length == 64} == {"off"}


def test_rows_and_workers_change_nothing_beyond_rounding(options: list[str]) -> None:
    main(options)
    one = {key(r): r for r in rows_of(options)}
    found_in(options, "*.jsonl").unlink()
    main([*options, "--data.batch_size", "2", "--data.cache", "false", "--data.num_workers", "1"])
    other = {key(r): r for r in rows_of(options)}
    assert one.keys() == other.keys()
    for name, row in one.items():
        assert row["nll"] == pytest.approx(other[name]["nll"], rel=1e-5), name
        assert row.get("distance") == other[name].get("distance")


def test_memory_is_what_lies_before_the_window_within_the_context(options: list[str]) -> None:
    main(options)
    for row in rows_of(options):
        if "chunks" in row:
            assert 0 < row["chunks"] <= 3 and 16 <= row["distance"] <= row["length"] - 64
        if row["setting"] == "recent" and row["length"] >= 256:
            assert row["distance"] == pytest.approx(32), "of 16, 32 and 48"


class Stop(Exception):
    """What a test interrupts with."""


def test_an_interrupted_grid_goes_on_where_it_stopped(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(options)
    whole = {key(r): r["nll"] for r in rows_of(options)}
    found_in(options, "*.jsonl").unlink()
    measured = WindowScorer.measure
    begun = []

    def stops(self: WindowScorer) -> Any:
        begun.append(self.window)
        if len(begun) == 6:
            raise KeyboardInterrupt
        yield from measured(self)

    monkeypatch.setattr(WindowScorer, "measure", stops)
    assert main(options) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert 0 < len(rows_of(options)) < len(whole)
    monkeypatch.setattr(WindowScorer, "measure", lambda self: (begun.append(self.window), (yield from measured(self))))
    main(options)
    assert {key(r): r["nll"] for r in rows_of(options)} == pytest.approx(whole)
    assert len(begun) == 13, "of 12 windows five were finished, and only the others were begun again"
    monkeypatch.setattr(WindowScorer, "measure", lambda self: pytest.fail("everything is there"))
    assert main(options) == 0


def test_tables_figures_and_settings_are_written(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--evaluation.hindsight", "6"]) == 0
    folder = found_in(options, "*.jsonl").parent
    assert "PerplexityGrid-" in folder.name and folder.name in capsys.readouterr().out
    with (folder / "perplexity.csv").open() as file:
        table = list(csv.DictReader(file))
    best = {r["setting"]: float(r["ratio"]) for r in table if r["length"] == "512"}
    assert best["off"] == 1 and "hindsight" in best
    rows = [r for r in rows_of(options) if (r["setting"], r["length"]) == ("recent", 512)]
    expected = math.exp(sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows))
    assert [float(r["perplexity"]) for r in table if (r["setting"], r["length"]) == ("recent", "512")] == [
        pytest.approx(expected)
    ]
    text = (folder / "perplexity.md").read_text()
    assert "current (LEAKS)" in text and "not a fair number" in text and f"{expected:.3f}" in text
    for name in ("perplexity-perplexity.png", "perplexity-where.png", "config_test.yaml", "run_test.json"):
        assert (folder / name).stat().st_size > 0
    assert list(folder.glob("events*"))


@pytest.mark.parametrize("more", [[], ["--evaluation.protocol", "reference"]])
def test_windows_that_do_not_overlap_score_the_same_tokens_too(
    options: list[str], more: list[str], byte_backbone: Path
) -> None:
    """The first token of a window has nothing to be predicted from: then it counts in no cell, however long."""
    peer = ["--evaluation.peers", json.dumps({"plain": str(byte_backbone)}), "--evaluation.lengths", "[128, 256]"]
    assert main([*options, "--data.stride", "64", *peer, *more]) == 0
    rows = rows_of(options)
    assert {r["tokens"] for r in rows} == {63}
    by = {key(r): r for r in rows}
    for name, row in by.items():
        if row["setting"] == "longer window" and row["length"] == 128:  # 64 + 3 x 16 of 128 tokens
            assert row["nll"] != by[(*name[:3], "plain")]["nll"]
    texts = {p.name: p.read_text() for p in Path(options[options.index("--data.path") + 1]).iterdir()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(byte_backbone), AutoTokenizer.from_pretrained(byte_backbone)
    for row in [r for r in rows if r["setting"] in ("plain", "longer window", "off")][:12]:
        wide = {"plain": row["length"], "longer window": min(row["length"], 112), "off": 64}[row["setting"]]
        ids = torch.tensor([tokenizer(texts[row["document"]], split_special_tokens=True)["input_ids"]])[
            :, row["window"] - wide : row["window"]
        ]
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)[0, :-1]
        assert row["nll"] == pytest.approx(float(-log_p.gather(1, ids[0, 1:, None])[-63:].sum()), rel=1e-4)


def test_a_query_that_leaks_is_named_whatever_it_is_called(options: list[str]) -> None:
    settings = "{mine: {}, wide: {selection: neighbours}, fair: {query: previous}}"
    assert main([*options, "--memory.query", "current", SETTING, settings]) == 0
    assert {r["setting"] for r in rows_of(options)} == {"off", "longer window", "mine (LEAKS)", "wide (LEAKS)", "fair"}
    assert "not a fair number" in found_in(options, "perplexity.md").read_text()


def test_one_bank_is_read_in_several_ways(options: list[str]) -> None:
    ways = {"own": "{}", "far": "{model: {memory_near: 0}}", "running": "{model: {position: sequential}}",
            "same": "{model: {position: fixed, memory_near: 1024}}", "few": "{model: {memory_reference: 16}}",
            "few far": "{model: {memory_near: 0, memory_reference: 16}}"}  # fmt: skip
    settings = "{" + ", ".join(f"{name}: {fields}" for name, fields in ways.items()) + "}"
    assert main([*options, SETTING, settings]) == 0
    by = {name: [r["nll"] for r in rows_of(options) if r["setting"] == name] for name in ways}
    assert by["own"] == by["same"] == by["few"], "in texts this short, all of memory is near"
    assert len({tuple(losses) for losses in by.values()}) == 4


@pytest.mark.parametrize("retriever", ["bm25", "hybrid"])
def test_words_that_come_later_do_not_weigh(options: list[str], tmp_path: Path, retriever: str) -> None:
    """BM25 counts how rare words are among chunks that can be found, so text after a window changes nothing in it."""
    folder = tmp_path / "own"
    folder.mkdir()
    text = " ".join(random.Random(0).choices(["apple", "bear", "cat", "door", "egg", "fox", "gate"], k=400))
    given = [*options, "--data.path", str(folder), SETTING, f"{{words: {{retriever: {{name: {retriever}}}}}}}",
             "--evaluation.windows", "8"]  # fmt: skip
    found = []
    for rest in ("", " apple" * 60):
        (folder / "a.txt").write_text(text[:1024] + (rest or text[1024:1384]))
        main(given)
        digest = rows_of(options)[-1]["text"]
        rows = [r for r in rows_of(options) if r["text"] == digest]
        found.append({r["window"]: r["nll"] for r in rows if r["setting"] == "words" and r["length"] == 512})
    same = [end for end in found[0] if end <= 1024 and end in found[1]]
    assert len(same) >= 3
    for end in same:
        assert found[0][end] == pytest.approx(found[1][end], rel=1e-6)


def test_the_published_protocol(options: list[str]) -> None:
    assert main([*options, "--evaluation.protocol", "reference", "--evaluation.lengths", "[32, 64, 256]"]) == 0
    rows = rows_of(options)
    for row in rows:
        assert row["window"] % row["length"] == 0 and row["tokens"] == min(row["length"], 64) - 1
    with found_in(options, "perplexity.csv").open() as file:
        table = {(r["setting"], r["length"]): float(r["perplexity"]) for r in csv.DictReader(file)}
    means = [r["nll"] / r["tokens"] for r in rows if (r["setting"], r["length"]) == ("retrieved", 256)]
    assert table["retrieved", "256"] == pytest.approx(math.exp(sum(means) / len(means)))


def test_another_text_under_the_same_name_is_measured_anew(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.txt").write_text("one two three four " * 60)
    given = [*options, "--data.path", str(folder)]
    main(given)
    before = len(rows_of(options))
    (folder / "a.txt").write_text("five six seven eight " * 60)
    main(given)
    rows = rows_of(options)
    assert len(rows) > before and len({r["text"] for r in rows}) == 2
    with found_in(options, "perplexity.csv").open() as file:
        assert {int(r["windows"]) for r in csv.DictReader(file)} == {4}, "the old text has no part in the table"


def test_several_corpora_in_one_table(options: list[str], text_folder: Path) -> None:
    corpora = {"all": str(text_folder), "one": {"path": str(text_folder / "document-03.txt"), "class_path": "PG19"}}
    assert main([*options, "--evaluation.corpora", json.dumps(corpora)]) == 0
    rows = rows_of(options)
    assert {r["document"] for r in rows if r["corpus"] == "one"} == {"document-03.txt"}
    assert len({r["document"] for r in rows if r["corpus"] == "all"}) == 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--evaluation.lengths", "[65536]"], "the longest of .* has"),
        (["--evaluation.lengths", "[40]"], "multiples of memory.chunk_size=16 above data.stride=32"),
        ([SETTING, '{a: {selektion: recent}}'], "evaluation.settings.a.selektion"),
        ([SETTING, '{a: {retriever: {nam: bm25}}}'], "evaluation.settings.a.retriever.nam"),
        ([SETTING, '{a: {capacity: 64}}'], "evaluation.settings.a=.*capacity"),
        ([SETTING, '{off: {}}'], "names of their own"),
        ([SETTING, '{a: {model: {source: single}}}'], "evaluation.settings.a.model=.*source.*memory_near"),
        ([SETTING, '{a: {model: {memory_weights: /nowhere}}}'], "model.memory_weights='/nowhere' cannot be read"),
        (["--evaluation.peers", '{other: /nowhere}'], "evaluation.peers.other='/nowhere' cannot be loaded"),
        (["--evaluation.corpora", '{a: {class_path: Nothing}}'], "evaluation.corpora.a.class_path"),
        (["--evaluation.corpora", '{a: {pth: x}}'], "evaluation.corpora.a.pth"),
        (["--memory.enabled", "false"], "memory.enabled=False"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_told(
    options: list[str], more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, *more]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_finished_cells_survive_a_mistake(
    options: list[str], byte_backbone: Path, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *options[1 : options.index("--config", 3)], "--model.backbone", str(tiny_backbone)]
    assert main(fit) == 0
    main(options)
    file = found_in(options, "*.jsonl")
    before = file.read_bytes()
    checkpoint = str(next((tmp_path / "runs").rglob("last.ckpt")))
    capsys.readouterr()
    assert main([*options, "--ckpt_path", checkpoint, "--model.backbone", str(byte_backbone)]) == 2
    assert "was made from another backbone" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize("file", sorted(f.name for f in EVAL.glob("*.yaml")))
def test_every_shipped_evaluation_can_be_read(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--config", str(ROOT / "conf" / "memlong.yaml"), "--config", str(EVAL / file), "--print_config"])
    assert stopped.value.code in (None, 0)
    given, printed = yaml.safe_load((EVAL / file).read_text()), yaml.safe_load(capsys.readouterr().out)
    for name, value in given["evaluation"]["init_args"].items():
        assert printed["evaluation"]["init_args"][name] == value, name
