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

from lightning_memlong.cli import MemLongCLI, main
from lightning_memlong.evaluation import InContextLearning, RecallProbes
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.cells import Cells
from lightning_memlong.evaluation.reading import read
from lightning_memlong.evaluation.recall import planted
from lightning_memlong.evaluation.tasks import load_task
from tests.integration.helpers import ROOT, tiny

EVAL = ROOT / "conf" / "eval"
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


def rows_of(options: list[str]) -> list[dict[str, Any]]:
    """What an evaluation measured."""
    return [json.loads(line) for line in found_in(options, "*.jsonl").read_text().splitlines()]


def found_in(options: list[str], pattern: str) -> Path:
    runs = Path(options[options.index("--trainer.logger.save_dir") + 1])
    return max(runs.glob(f"memlong/*/{pattern}"), key=lambda f: f.stat().st_mtime)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("document", "window", "length", "setting"))


# ---- perplexity -------------------------------------------------------------------------------------------


def test_plain_cells_are_what_transformers_alone_computes(options: list[str], byte_backbone: Path) -> None:
    peer = ["--evaluation.peers", json.dumps({"plain": str(byte_backbone)})]
    assert main([*options, *peer]) == 0
    rows = rows_of(options)
    texts = {p.name: p.read_text() for p in Path(options[options.index("--data.path") + 1]).iterdir()}
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
        ids = torch.tensor([tokenizer(texts[row["document"]])["input_ids"]])
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
        "off", "longer window", "retrieved", "nearest of last 4", "recent", "random", "current (LEAKS)"}  # fmt: skip
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
    measured = Cells.rows
    begun = []

    def stops(self: Cells) -> Any:
        begun.append(self.window)
        if len(begun) == 6:
            raise KeyboardInterrupt
        yield from measured(self)

    monkeypatch.setattr(Cells, "rows", stops)
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().out
    assert 0 < len(rows_of(options)) < len(whole)
    monkeypatch.setattr(Cells, "rows", lambda self: (begun.append(self.window), (yield from measured(self))))
    main(options)
    assert {key(r): r["nll"] for r in rows_of(options)} == pytest.approx(whole)
    assert len(begun) == 13, "of 12 windows five were finished, and only the others were begun again"
    monkeypatch.setattr(Cells, "rows", lambda self: pytest.fail("everything is there"))
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
        ids = torch.tensor([tokenizer(texts[row["document"]])["input_ids"]])[:, row["window"] - wide : row["window"]]
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)[0, :-1]
        assert row["nll"] == pytest.approx(float(-log_p.gather(1, ids[0, 1:, None])[-63:].sum()), rel=1e-4)


def test_a_query_that_leaks_is_named_whatever_it_is_called(options: list[str]) -> None:
    assert main([*options, "--memory.query", "current", SETTING, "{mine: {}, fair: {query: previous}}"]) == 0
    assert {r["setting"] for r in rows_of(options)} == {"off", "longer window", "mine (LEAKS)", "fair"}
    assert "not a fair number" in found_in(options, "perplexity.md").read_text()


def test_words_that_come_later_do_not_weigh(options: list[str], tmp_path: Path) -> None:
    """BM25 counts how rare words are among chunks that can be found, so text after a window changes nothing in it."""
    folder = tmp_path / "own"
    folder.mkdir()
    text = " ".join(random.Random(0).choices(["apple", "bear", "cat", "door", "egg", "fox", "gate"], k=400))
    given = [*options, "--data.path", str(folder), SETTING, "{words: {retriever: {name: bm25}}}",
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


# ---- in-context learning and recall -------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    folder.mkdir()
    lines = [f"{i % 2},film number {i} was {'bad' if i % 2 == 0 else 'fine'}\n" for i in range(60)]
    (folder / "train.csv").write_text("".join(lines))
    return folder


def icl(byte_backbone: Path, text_folder: Path, tmp_path: Path, task: Path, *more: str) -> list[str]:
    small = tiny(byte_backbone, text_folder, tmp_path / "runs")
    return ["test", *small, "--config", str(EVAL / "icl.yaml"), "--memory.top_k", "3",
            "--evaluation.tasks", json.dumps({"MR": str(task), "SST-5": str(task)}), "--evaluation.context", "[0, 4]",
            "--evaluation.memory", "[0, 8]", "--evaluation.examples", "6", "--evaluation.seeds", "2",
            "--evaluation.window", "128", "--evaluation.batch_size", "4", *more]  # fmt: skip


@pytest.mark.parametrize("retriever", ["hashing", "bm25", "hidden"])
def test_in_context_learning(
    retriever: str, byte_backbone: Path, text_folder: Path, tmp_path: Path, task: Path
) -> None:
    options = icl(byte_backbone, text_folder, tmp_path, task, "--memory.retriever.name", retriever)
    assert main(options) == 0
    rows = rows_of(options)
    assert len(rows) == 2 * 2 * (2 + 2 * 2) and all(len(r["hits"]) == 6 for r in rows)
    text = found_in(options, "icl.md").read_text()
    assert "4 + 8 (similarity)" in text and "majority class" in text
    before = found_in(options, "*.jsonl").read_bytes()
    assert main(options) == 0 and found_in(options, "*.jsonl").read_bytes() == before


def test_label_words_are_scored_by_their_likelihood(
    byte_backbone: Path, text_folder: Path, tmp_path: Path, task: Path
) -> None:
    """Accuracy without memory, from transformers alone, text by text."""
    options = icl(byte_backbone, text_folder, tmp_path, task, "--evaluation.tasks", json.dumps({"MR": str(task)}))
    assert main(options) == 0
    rows = {(r["seed"], r["context"]): r for r in rows_of(options) if r["memory"] == 0}
    evaluation = InContextLearning({"MR": str(task)}, [0, 4], [0, 8], examples=6, seeds=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(byte_backbone), AutoTokenizer.from_pretrained(byte_backbone)
    for seed in range(2):
        drawn = evaluation._draw("MR", seed, *load_task("MR", str(task), "x"))
        for context in (0, 4):
            words = ("negative", "positive")
            shown = "".join(f"Review: {e.text} Sentiment: {words[e.label]}. " for e in drawn.context[:context])
            hits = ""
            for example in drawn.asked:
                scores = []
                for word in words:
                    prompt = f"{shown}Review: {example.text} Sentiment:"
                    ids = torch.tensor([tokenizer(f"{prompt} {word}")["input_ids"]])
                    count = len(word) + 1
                    with torch.no_grad():
                        log_p = model(ids).logits.log_softmax(-1)[0, -count - 1 : -1]
                    scores.append(float(log_p.gather(1, ids[0, -count:, None]).sum()))
                hits += str(int((scores[1] > scores[0]) == (example.label == 1)))
            assert rows[seed, context]["hits"] == hits


def test_bad_tasks_are_told(
    byte_backbone: Path, tiny_backbone: Path, text_folder: Path, tmp_path: Path, task: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    options = icl(byte_backbone, text_folder, tmp_path, task)
    for more, told in (
        (["--evaluation.tasks", '{MR: /nowhere}'], "evaluation.tasks.MR='/nowhere'"),
        (["--evaluation.tasks", '{IMDB: null}'], "evaluation.tasks='IMDB'"),
        (["--evaluation.memory", "[500]"], "at most the 48 training examples"),
        (["--model.backbone", str(tiny_backbone)], "words whose tokens begin after the cue, and that the tokenizer"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main([*options, *more]) == 2
        assert told in capsys.readouterr().err, told


def recall(byte_backbone: Path, text_folder: Path, tmp_path: Path, *more: str) -> list[str]:
    small = tiny(byte_backbone, text_folder, tmp_path / "runs")
    return ["test", *small, "--config", str(EVAL / "recall.yaml"), "--data.window", "512", "--memory.chunk_size", "64",
            "--memory.capacity", "1024", "--evaluation.kinds", "[pass_key, key_value]", "--evaluation.lengths",
            "[1024, 2048]", "--evaluation.depths", "[0, 0.5, 1]", "--evaluation.samples", "1",
            "--memory.retriever.name", "bm25", "--evaluation.selections", "[similarity, recent, random]",
            *more]  # fmt: skip


def test_recall(byte_backbone: Path, text_folder: Path, tmp_path: Path) -> None:
    options = recall(byte_backbone, text_folder, tmp_path)
    assert main(options) == 0
    rows = rows_of(options)
    assert len(rows) == 2 * 2 * 3 * 4
    asked = [r for r in rows if r["kind"] == "pass_key" and r["setting"] == "similarity" and not r["local"]]
    assert len(asked) == 4 and all(r["hit"] == 1 for r in asked), "the one place that speaks of a pass key is found"
    drawn = [r["nll"] for r in rows if r["setting"] == "random" and r["length"] == 2048]
    assert len(set(drawn)) == len(drawn)
    assert all(r["local"] for r in rows if r["depth"] == 1 and r["kind"] == "pass_key")
    folder = found_in(options, "recall.md").parent
    assert (folder / "recall-accuracy.png").exists() and "retrieved [%]" in (folder / "recall.md").read_text()


def test_a_planted_bank_is_the_bank_of_the_planted_document(
    byte_backbone: Path, text_folder: Path, tmp_path: Path
) -> None:
    """Reading only the windows that differ gives the very bank that reading all of the document gives."""
    options = tiny(byte_backbone, text_folder, tmp_path / "runs")
    cli = MemLongCLI([*options, "--data.window", "512"], run=False)
    callback: Any = cli.trainer.memory_callback()

    class Nothing:
        def begin(self, total: int, what: str) -> None: ...

        def advance(self, tokens: int) -> None: ...

    subject = Subject(
        cli.model.model.eval(), cli.model.tokenizer, callback.config, cli.datamodule, "tiny", lambda *_: None,
        Nothing(), cli.trainer.precision_plugin.forward_context, callback.retrieval(cli.model).retriever,
    )  # fmt: skip
    evaluation = RecallProbes(["key_value"], [2048], [0.3], 1)
    evaluation.prepare(subject)
    (probe,) = evaluation._probes.values()
    retrieval = subject.retrieval()
    bank = read(subject, [retrieval], [evaluation._filler], 512)[0]
    document = evaluation._filler.copy()
    document[: probe.question] = probe.tokens[: probe.question]
    expected = read(subject, [retrieval], [document], 512)[0]
    everything = torch.arange(2048 // 16)[None]

    def content() -> tuple[torch.Tensor, ...]:
        record = bank.gather(everything, count=False)
        assert record is not None
        return record.keys, record.values, bank.entries(0).embeddings.clone()

    before = content()
    wanted = expected.gather(everything, count=False)
    assert wanted is not None
    with planted(subject, retrieval, bank, probe, evaluation._filler, 512):
        keys, values, embeddings = content()
        torch.testing.assert_close(keys, wanted.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values, wanted.values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(embeddings, expected.entries(0).embeddings)
        assert (keys - before[0]).abs().max() > 1e-2
    for now, then in zip(content(), before, strict=True):
        torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-4)


def test_recall_as_a_corpus_scores_answers_alone(byte_backbone: Path, text_folder: Path, tmp_path: Path) -> None:
    small = tiny(byte_backbone, text_folder, tmp_path / "runs")
    at = small.index("--data.path")
    options = [*small[:at], *small[at + 2 :], "--data", "datamodules.SyntheticRecall", "--data.window", "512",
               "--data.kinds", "[pass_key, key_value]", "--data.lengths", "[1024, 1600]", "--data.samples", "1",
               "--data.batch_size", "2", "--memory.capacity", "1024"]  # fmt: skip
    cli = MemLongCLI(options, run=False)
    cli.datamodule.setup("fit")
    stream = cli.datamodule.val_dataloader()
    scored: dict[int, list[int]] = {}
    for batch in stream:
        for row, document in enumerate(batch["document_id"].tolist()):
            labels = batch["labels"][row]
            scored.setdefault(document, []).extend(labels[labels != -100].tolist())
    for document, probe in enumerate(stream.cache.probes):
        assert scored[document] == probe.tokens[probe.answer :].tolist()
    assert not {p.tokens.tobytes() for p in stream.cache.probes} & {
        p.tokens.tobytes() for p in cli.datamodule._streams["train"].cache.probes
    }
    assert main(["fit", *options]) == 0


@pytest.mark.parametrize("file", sorted(f.name for f in EVAL.glob("*.yaml")))
def test_every_shipped_evaluation_can_be_read(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--config", str(ROOT / "conf" / "memlong.yaml"), "--config", str(EVAL / file), "--print_config"])
    assert stopped.value.code in (None, 0)
    given, printed = yaml.safe_load((EVAL / file).read_text()), yaml.safe_load(capsys.readouterr().out)
    for name, value in given["evaluation"]["init_args"].items():
        assert printed["evaluation"]["init_args"][name] == value, name
