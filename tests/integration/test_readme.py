"""What the README says is what happens."""

import importlib
import inspect
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from datamodules.documents import DocumentDataModule
from datamodules.local_text import LocalText
from lightning_memlong.cli.chat import main as chat
from lightning_memlong.cli.main import main
from lightning_memlong.config import MemoryConfig, ModelConfig, RetrieverConfig, TuningConfig
from lightning_memlong.sweep.command import main as sweep
from lightning_memlong.sweep.resolve import ConfigResolver
from lightning_memlong.sweep.spread import read as read_spread
from lightning_memlong.training import MemLongModule
from tests.integration.helpers import ROOT, tiny, without_capacity

README = (ROOT / "README.md").read_text()
COMMANDS = [line for line in README.splitlines() if line.startswith(("python train.py", "PYTHONPATH"))]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("command", [c for c in COMMANDS if "ckpt_path" not in c and "paper.yaml" not in c])
def test_commands_run(
    command: str,
    tiny_backbone: Path,
    byte_backbone: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = shlex.split(command)
    if words[0].startswith("PYTHONPATH"):
        policy = README.split("# my_policies.py")[1].split("```")[0]
        (tmp_path / "my_policies.py").write_text(policy)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("my_policies", None)
    args = words[words.index("train.py") + 1 :]
    backbone = byte_backbone if "eval/" in command else tiny_backbone
    small = tiny(backbone, text_folder, tmp_path / "runs")[2:]
    if args[0] == "predict":
        (tmp_path / "book.txt").write_text("kan lor mis tur " * 60)
        small = [*without_capacity(small), "--data.path", str(tmp_path / "book.txt"), "--bank", str(tmp_path / "bank")]
    layers = ["--model.retrieval_layers", "[1,3]"] if "single" in command else []
    monkeypatch.chdir(ROOT)
    assert main([*args, *small, *layers, *_evaluated_small(command, tmp_path)]) == 0


def _evaluated_small(command: str, folder: Path) -> list[str]:
    """Options that make an evaluation one of seconds."""
    if "eval/icl" in command:
        (folder / "train.csv").write_text("".join(f"{i % 2},film {i}\n" for i in range(40)))
        return ["--evaluation.tasks", f"{{MR: {folder}}}", "--evaluation.context", "[0, 2]", "--evaluation.memory",
                "[0, 4]", "--evaluation.examples", "3", "--evaluation.seeds", "1"]  # fmt: skip
    if "eval/recall" in command:
        return ["--data.window", "384", "--evaluation.kinds", "[pass_key]", "--evaluation.lengths", "[768]",
                "--evaluation.samples", "1", "--memory.capacity", "1024"]  # fmt: skip
    if "eval/ruler" in command:
        pytest.importorskip("wonderwords")
        importlib.import_module("tests.few_words").import_few_words()
        return ["--data.window", "512", "--evaluation.tasks", "[fwe]", "--evaluation.lengths", "[1024]",
                "--evaluation.samples", "1", "--memory.capacity", "1024"]  # fmt: skip
    if "eval/eviction" in command:
        return ["--data.stride", "48", "--evaluation.length", "960", "--evaluation.capacities", "[256]",
                "--evaluation.windows", "2", "--evaluation.documents", "1", "--evaluation.facts", "0"]  # fmt: skip
    if "eval/" in command:
        return ["--data.stride", "32", "--evaluation.lengths", "[64, 192]", "--evaluation.windows", "2",
                "--evaluation.documents", "1", "--evaluation.hindsight", "2", "--memory.capacity", "1024"]  # fmt: skip
    return []


SWEEPS = [line for line in README.splitlines() if line.startswith("python -m lightning_memlong.sweep ")]
SPREAD = [line for line in README.splitlines() if line.startswith("python -m lightning_memlong.sweep.spread")]


@pytest.mark.parametrize("command", SWEEPS)
def test_sweep_commands_are_planned(command: str, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("path/to/folder", str(text_folder)))
    assert len(SWEEPS) >= 4 and sweep([*words[3:], "--dry_run"]) == 0


def test_the_command_that_spreads_an_evaluation_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = SPREAD
    spread, arguments = read_spread(shlex.split(command)[3:])
    config = ConfigResolver("test").resolve(arguments)
    assert spread.launcher == "slurm" and spread.parts == config["evaluation"]["init_args"]["documents"] == 8


def test_the_table_of_settings_is_the_configuration() -> None:
    config = yaml.safe_load((ROOT / "conf" / "memlong.yaml").read_text())
    config["data"] = config["data"]["init_args"]
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", README, flags=re.M)
    assert len(rows) >= 15
    for key, default in rows:
        value = config
        for part in key.split("."):
            value = value[part]
        assert yaml.safe_load(default) == value, key


def test_the_default_file_names_every_option_of_ours() -> None:
    config = yaml.safe_load((ROOT / "conf" / "memlong.yaml").read_text())
    fields = {
        "memory": (MemoryConfig, config["memory"]),
        "memory.retriever": (RetrieverConfig, config["memory"]["retriever"]),
        "model.tuning": (TuningConfig, config["model"]["tuning"]),
    }
    for name, (settings, given) in fields.items():
        assert set(settings.__dataclass_fields__) == set(given), name
    model = set(inspect.signature(MemLongModule.__init__).parameters) - {"self", "settings"}
    assert model | set(ModelConfig.__dataclass_fields__) == set(config["model"])
    base, local = (set(inspect.signature(c.__init__).parameters) for c in (DocumentDataModule, LocalText))
    linked = {"self", "kwargs", "tokenizer", "chunk_size", "seed"}
    assert (base | local) - linked == set(config["data"]["init_args"])


def test_files_the_readme_points_to_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_python_examples_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MEMLONG_CACHE")
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(Path(os.__file__).read_text()[:6000])
    book, without_lightning, file = re.findall(r"```python\n(?!# my_policies)(.*?)```", README, flags=re.S)
    exec(compile(book, "README.md", "exec"), {})
    assert Path("book.safetensors").exists() and len(capsys.readouterr().out) > 20
    names: dict[str, Any] = {}
    exec(compile(without_lightning, "README.md", "exec"), names)
    assert float(capsys.readouterr().out.split("(")[1].split(",")[0]) > 0
    exec(compile(file, "README.md", "exec"), names)
    assert names["same"].stats()["entries"] == 4


def test_the_chat_command_runs(
    byte_backbone: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = [line for line in README.splitlines() if line.startswith("python -m lightning_memlong.cli.chat")]
    (tmp_path / "book.txt").write_text("kan lor mis tur " * 60)
    words = command.replace("path/to/book.txt", str(tmp_path / "book.txt"))
    words = words.replace("book.safetensors", str(tmp_path / "b"))
    options = without_capacity(tiny(byte_backbone, text_folder, tmp_path / "runs")[2:])
    at = options.index("--data.path")
    typed = iter(["kan", "/quit"])
    monkeypatch.setattr("builtins.input", lambda shown: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)  # a person types, nothing is piped in
    assert chat([*shlex.split(words)[3:], *options[:at], *options[at + 2 :]]) == 0
    assert (tmp_path / "b").exists()
