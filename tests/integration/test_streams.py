"""Every corpus through ``train.py``: from files and from a web server, resumed, and in two processes."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules import network
from lightning_memlong.cli.main import main
from tests.conftest import WORDS
from tests.hub import FakeHub
from tests.integration.helpers import ROOT, recorded, recording, tiny
from tests.server import Server


def prose(seed: int, words: int) -> str:
    mixer = random.Random(seed)
    return " ".join(mixer.choice(WORDS) for _ in range(words))


def write_pg19(folder: Path) -> Path:
    for seed, part, count in ((0, "train", 7), (10, "validation", 2), (20, "test", 2)):
        (folder / part).mkdir(parents=True)
        for i in range(count):
            (folder / part / f"{part}{i}.txt").write_text(prose(seed + i, 150 + 90 * i))
    return folder


def write_proof_pile(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for seed, part, count in ((100, "train", 8), (110, "validation", 2), (120, "test", 2)):
        rows = [{"text": prose(seed + i, 120 + 60 * i), "meta": json.dumps({"config": "arxiv"})} for i in range(count)]
        (folder / f"proofpile_{part}_0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_wikitext(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for part, count in (("train", 8), ("valid", 2), ("test", 2)):
        articles = [f" = {part} {i} = \n \n {prose(200 + i, 130)} \n \n = = More = = \n \n {prose(i, 60)} \n \n"
                    for i in range(count)]  # fmt: skip
        (folder / f"wiki.{part}.raw").write_text(" \n" + "".join(articles))
    return folder


def write_bookcorpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = [json.dumps({"text": prose(300 + i, 12) + " ."}) for i in range(300)]
    (folder / "books.jsonl").write_text("\n".join(rows))
    return folder


WRITE = {"pg19": write_pg19, "proof_pile": write_proof_pile, "wikitext103": write_wikitext,
         "bookcorpus": write_bookcorpus}  # fmt: skip


def options(corpus: str, backbone: Path, path: object, runs: Path) -> list[str]:
    own = ["--data.run_characters", "1500"] if corpus == "bookcorpus" else []
    conf = ["--config", str(ROOT / "conf" / "data" / f"{corpus}.yaml")]
    base = tiny(backbone, Path("unused"), runs)
    return [*base[:2], *conf, *base[2:], "--data.path", str(path), *own]


@pytest.mark.parametrize(
    "corpus", [name if name in ("pg19", "proof_pile") else pytest.param(name, marks=pytest.mark.long) for name in WRITE]
)
def test_each_corpus_trains_and_tests_from_files_and_from_a_server(
    corpus: str, tiny_backbone: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = WRITE[corpus](tmp_path / "corpus")
    seen = []
    for name, path in (("files", folder), ("server", server.serve(folder))):
        args = [*options(corpus, tiny_backbone, path, tmp_path / name), *recording(tmp_path / name)]
        for command in (["fit", *args, "--validate_first", "false"], ["test", *args, "--ckpt_path", "last"]):
            code = main([*command, "--data.batch_size", "2"])
            said = capsys.readouterr()
            assert code == 0, said.err[-2_000:]
        assert "Test perplexity" in said.out
        seen.append(recorded(tmp_path / name))
    assert seen[0] == seen[1], "the same batches"
    assert {line["stage"] for line in seen[0]} == {"train", "test"} and len(seen[0]) >= 6


def test_a_server_that_fails_now_and_then_changes_nothing(
    tiny_backbone: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "FIRST_WAIT_S", 0.001)
    folder = write_proof_pile(tmp_path / "corpus")
    seen = []
    for faults in (0, 3):
        path = json.dumps(
            {part: f"{server.serve(folder)}/proofpile_{part}_0.jsonl" for part in ("train", "validation")}
        )
        args = [*options("proof_pile", tiny_backbone, path, tmp_path / "runs"), *recording(tmp_path / str(faults))]
        server.faults, server.kind = faults, "half"
        assert main(["fit", *args, "--validate_first", "false"]) == 0
        seen.append(recorded(tmp_path / str(faults)))
        assert server.faults == 0
    assert seen[0] == seen[1]


FAULTS = {
    "cut gz": ("x.jsonl.gz", lambda rows: gzip.compress(rows)[:-20], ["x.jsonl.gz:", "the rest of the file cannot be"]),
    "bytes": ("x.jsonl", lambda rows: rows.replace(b"}", b"\xff}", 1), ["x.jsonl:1 ", "utf-8", "on_bad_document skip"]),
    "column": ("x.jsonl", lambda rows: rows.replace(b'"text"', b'"body"'), ["data.text_column='text'", "'body'"]),
    "empty": ("x.txt", lambda rows: b"", ["x.txt ", "it is empty"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_text_that_cannot_be_used_ends_the_run_with_its_place(
    name: str, tiny_backbone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, spoil, words = FAULTS[name]
    folder = write_pg19(tmp_path / "corpus")
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    rows = "\n".join(json.dumps({"text": prose(i, 300)}) for i in range(5)).encode()
    (folder / "train" / file).write_bytes(spoil(rows))
    args = options("pg19", tiny_backbone, folder, tmp_path / "runs")
    assert main(["fit", *args, "--validate_first", "false", "--trainer.max_steps", "100"]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error and all(word in error.rsplit("error:")[-1] for word in words), error


def fit(args: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", "fit", *args]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["pg19", pytest.param("proof_pile", marks=pytest.mark.long)])
def test_the_defaults_stream_from_the_hub(corpus: str, tiny_backbone: Path, tmp_path: Path) -> None:
    """The hub is a model of it on this machine; its client is the real one."""
    if corpus == "pg19":
        folder = tmp_path / "hub" / "emozilla" / "pg19" / "data"
        folder.mkdir(parents=True)
        for part, shards in (("train", 2), ("validation", 1), ("test", 1)):
            for i in range(shards):
                books = pa.table({"short_book_title": ["t"] * 3, "text": [prose(10 * i + k, 300) for k in range(3)]})
                pq.write_table(books, folder / f"{part}-{i:05d}-of-{shards:05d}.parquet")
    else:
        for part in ("train", "dev", "test"):
            folder = tmp_path / "hub" / "hoskinson-center" / "proof-pile" / part
            folder.mkdir(parents=True)
            rows = [json.dumps({"text": prose(k, 300), "meta": "{}"}) for k in range(3)]
            (folder / f"proofpile_{part}_0.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
        (folder.parent / "proof-pile.py").write_text("raise SystemExit('this must not run')")
    hub = FakeHub(tmp_path / "hub")
    args = [*options(corpus, tiny_backbone, "null", tmp_path / "runs"), *recording(tmp_path / "seen")]
    done = fit(args, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"))
    hub.close()
    assert done.returncode == 0, done.stderr
    assert "streamed from the hub data set" in done.stdout
    assert len(recorded(tmp_path / "seen")) == 4
    assert not list((tmp_path / "home").rglob("*.parquet")) and not list((tmp_path / "home").rglob("*.gz"))


def streamed(backbone: Path, folder: Path, runs: Path, workers: int) -> list[str]:
    """Options of a run that streams a few epochs."""
    more = ["--data.num_workers", str(workers), "--data.batch_size", "2", "--data.shuffle_buffer", "3",
            "--trainer.max_steps", "60", "--trainer.limit_val_batches", "2", "--validate_first", "false"]  # fmt: skip
    return [*options("pg19", backbone, folder, runs), *more]


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_that_is_killed_again_and_again_sees_every_window_in_order(
    workers: int, tiny_backbone: Path, tmp_path: Path
) -> None:
    folder = write_pg19(tmp_path / "corpus")
    for file in sorted((folder / "train").iterdir())[3:]:
        shutil.copy(file, file.with_name(f"again-{file.name}"))
    whole = fit([*streamed(tiny_backbone, folder, tmp_path / "whole", workers), *recording(tmp_path / "w")])
    assert whole.returncode == 0, whole.stderr
    expected = [{k: v for k, v in line.items() if k != "epoch"} for line in recorded(tmp_path / "w")]
    assert [line["step"] for line in expected] == list(range(60)) and recorded(tmp_path / "w")[-1]["epoch"] >= 1
    checkpoints = tmp_path / "checkpoints.yaml"
    checkpoints.write_text(
        "trainer:\n  callbacks:\n    - class_path: callbacks.checkpoint.LastCheckpoint\n"
        "      init_args: {every_n_train_steps: 4}\n"
    )
    kills = sorted(random.Random(workers).sample(range(6, 58), 2 if workers else 1))
    for attempt, kill in enumerate([*kills, None]):
        args = [*streamed(tiny_backbone, folder, tmp_path / "killed", workers), "--config", str(checkpoints)]
        args += ["--ckpt_path", "last"] if attempt else []
        args += recording(tmp_path / f"k{attempt}")
        if kill is not None:
            args += ["--trainer.callbacks+=tests.integration.helpers.KillAt", f"--trainer.callbacks.step={kill}"]
        done = fit(args)
        assert done.returncode == (0 if kill is None else -9), done.stderr
        seen = recorded(tmp_path / f"k{attempt}")
        first, last = seen[0]["step"], seen[-1]["step"]
        assert last == (59 if kill is None else kill) or last == kill - 1  # type: ignore[operator]
        assert [{k: v for k, v in line.items() if k != "epoch"} for line in seen] == expected[first : last + 1]


@pytest.mark.long
def test_two_processes_share_the_corpus_and_end_together(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = write_pg19(tmp_path / "corpus")
    pair = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    pair += ["--trainer.max_steps", "-1", "--model.scheduler.total_steps", "100"]
    for cache in ("false", "true"):
        file = tmp_path / cache
        args = [*streamed(tiny_backbone, folder, tmp_path / "runs" / cache, 0), *pair, "--data.cache", cache]
        done = fit([*args, *recording(file)])
        assert done.returncode == 0, done.stderr
        ranks = [[line for line in recorded(file, rank) if line["stage"] == "train"] for rank in (0, 1)]
        assert len(ranks[0]) == len(ranks[1]) > 10, "an epoch ends in both at once"
        read: dict[int, set[tuple[int, int]]] = {}
        tokens = 0
        for rank, lines in enumerate(ranks):
            for line in lines:
                tokens += sum(line["length"])
                for row, document in enumerate(line["document_id"]):
                    if document >= 0:
                        read.setdefault(document, set()).add((rank, row))
        assert len(read) == 7 and all(len(readers) == 1 for readers in read.values())
        assert {rank for readers in read.values() for rank, _ in readers} == {0, 1}
        assert tokens == sum(150 + 90 * i for i in range(7)), "the whole corpus, once"
    runs = tmp_path / "runs" / "false"
    saved = torch.load(next(runs.rglob("last.ckpt")), weights_only=True)
    assert len(saved["PG19"]["positions"]) == len(saved["memlong"]["random"]) == 2
    assert len(saved["callbacks"]["MemoryBankCallback"]["banks"]) == 2
    again = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    resumed = fit([*streamed(tiny_backbone, folder, runs, 2), *pair, "--data.cache", "false", *again])
    assert resumed.returncode == 0, resumed.stderr
    alone = fit([*streamed(tiny_backbone, folder, runs, 2), "--ckpt_path", "last", "--data.cache", "false"])
    assert alone.returncode == 2 and "trainer.devices=1" in alone.stderr and "Allowed: 2" in alone.stderr
