"""What the README says is what happens."""

import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from datamodules.documents import DocumentDataModule
from datamodules.local_text import LocalText
from lightning_memlong.cli import main
from lightning_memlong.config import MemoryConfig, RetrieverConfig, TuningConfig
from lightning_memlong.module import MemLongModule
from lightning_memlong.sweep.command import main as sweep
from tests.integration.helpers import ROOT, tiny

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
    if "eval/" in command:
        return ["--data.stride", "32", "--evaluation.lengths", "[64, 192]", "--evaluation.windows", "2",
                "--evaluation.documents", "1", "--evaluation.hindsight", "2"]  # fmt: skip
    return []


SWEEPS = [line for line in README.splitlines() if line.startswith("python -m lightning_memlong.sweep")]


@pytest.mark.parametrize("command", SWEEPS)
def test_sweep_commands_are_planned(command: str, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("path/to/folder", str(text_folder)))
    assert len(SWEEPS) >= 4 and sweep([*words[3:], "--dry_run"]) == 0


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
    model = set(inspect.signature(MemLongModule.__init__).parameters) - {"self"}
    assert model == set(config["model"])
    base, local = (set(inspect.signature(c.__init__).parameters) for c in (DocumentDataModule, LocalText))
    linked = {"self", "kwargs", "tokenizer", "chunk_size", "seed"}
    assert (base | local) - linked == set(config["data"]["init_args"])


def test_files_the_readme_points_to_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MEMLONG_CACHE")
    example = README.split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split("(")[1].split(",")[0]) > 0
