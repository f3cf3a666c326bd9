"""In-context learning and recall through train.py, and their banks against plain reading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules import SyntheticRecall
from lightning_memlong.cli.main import MemLongCLI, main
from lightning_memlong.errors import UserError
from lightning_memlong.evaluation import InContextLearning, RecallProbes
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.planted_bank import planted_bank
from lightning_memlong.evaluation.scoring import read_documents
from lightning_memlong.evaluation.tasks import load_task
from tests.integration.helpers import EVAL, found_in, rows_of, tiny


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
    assert all(len(set(r["asked"])) == 6 for r in rows)
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
        sample = evaluation.draw_sample("MR", seed, *load_task("MR", str(task), "x"))
        for context in (0, 4):
            words = ("negative", "positive")
            shown = "".join(f"Review: {e.text} Sentiment: {words[e.label]}. " for e in sample.context[:context])
            hits = ""
            for example in sample.asked:
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
        (["--evaluation.memory_context", "[20]"], "evaluation.memory_context=[20]"),
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
    sample = [r["nll"] for r in rows if r["setting"] == "random" and r["length"] == 2048]
    assert len(set(sample)) == len(sample)
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
    (probe,) = evaluation.probes.values()
    retrieval = subject.retrieval()
    bank = read_documents(subject, [retrieval], [evaluation.filler_tokens], 512)[0]
    document = evaluation.filler_tokens.copy()
    document[: probe.question] = probe.tokens[: probe.question]
    expected = read_documents(subject, [retrieval], [document], 512)[0]
    everything = torch.arange(2048 // 16)[None]

    def content() -> tuple[torch.Tensor, ...]:
        record = bank.gather(everything, count=False)
        assert record is not None
        return record.keys, record.values, bank.entries(0).embeddings.clone()

    before = content()
    wanted = expected.gather(everything, count=False)
    assert wanted is not None
    with planted_bank(subject, retrieval, bank, probe, evaluation.filler_tokens, 512):
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
    for name in ("kinds", "lengths", "depths"):
        with pytest.raises(UserError, match=f"data.{name}=.*at least one"):
            SyntheticRecall(**{name: []})
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
        p.tokens.tobytes() for p in cli.datamodule.train_dataloader().cache.probes
    }
    assert main(["fit", *options]) == 0
