"""What a stranger made is read without running anything of it: checkpoints, weights, banks, settings."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_memlong import MemLong, UserError
from lightning_memlong.bank import MemoryBank
from lightning_memlong.cli.main import main
from tests.integration.helpers import tiny

EVIL = "raise SystemExit('imported')\n"


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    return [*tiny(tiny_backbone, text_folder, tmp_path / "runs"), "--validate_first", "false"]


@pytest.fixture
def trained(options: list[str], tmp_path: Path) -> Path:
    """A checkpoint of our own, to be changed by a stranger."""
    assert main(["fit", *options]) == 0
    (file,) = tmp_path.rglob("last.ckpt")
    return file


@pytest.fixture
def evil_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that must not be imported."""
    (tmp_path / "evil_module.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "evil_module"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_pickles_are_not_opened(
    options: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, bank = tmp_path / "opened", tmp_path / "bank.safetensors"
    checkpoint = torch.load(trained, weights_only=True)
    torch.save(checkpoint | {"extra": Evil(mark)}, trained)
    bank.write_bytes(pickle.dumps(Evil(mark)))
    assert "cannot be read" in refused(["validate", *options, "--ckpt_path", str(trained)], capsys)
    assert "cannot be read" in refused(["fit", *options, "--ckpt_path", "last"], capsys)
    assert str(bank) in refused(["fit", *options, "--model.memory_weights", str(bank)], capsys)
    for work in (lambda: MemLong.from_pretrained(trained), lambda: MemoryBank.open(bank)):
        with pytest.raises(UserError):
            work()
    assert not mark.exists()


def test_a_backbone_of_pickles_is_not_opened(
    options: list[str], tiny_backbone: Path, tmp_path: Path
) -> None:  # fmt: skip
    mark, folder = tmp_path / "opened", tmp_path / "backbone"
    folder.mkdir()
    for file in tiny_backbone.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"model.norm.weight": Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError):
        MemLong.from_pretrained(folder, {"retriever": {"name": "hashing"}})
    assert not mark.exists()


def test_a_backbone_with_code_of_its_own_is_not_run(tiny_backbone: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "backbone", tmp_path / "run"
    folder.mkdir()
    for file in tiny_backbone.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = yaml.safe_load((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (folder / "config.json").write_text(
        str(config).replace("'", '"').replace("None", "null").replace("True", "true").replace("False", "false")
    )
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(UserError):
        MemLong.from_pretrained(folder, {"retriever": {"name": "hashing"}})
    assert not mark.exists()


@pytest.mark.parametrize(
    "put",
    [
        {"optimizer": {"class_path": "evil_module.Optimizer"}},
        {"scheduler": {"class_path": "evil_module.Scheduler"}},
        {"tuning": {"class_path": "evil_module.Tuning"}},
    ],
)
def test_settings_of_a_checkpoint_import_nothing(
    put: dict[str, Any], options: list[str], trained: Path, evil_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["hyper_parameters"] |= put
    torch.save(checkpoint, trained)
    said = refused(["validate", *options, "--ckpt_path", str(trained)], capsys)
    assert "the checkpoint's model." in said and next(iter(put)) in said
    with pytest.raises(UserError, match="the checkpoint's model"):
        MemLong.from_pretrained(trained)
    assert evil_module not in sys.modules


def test_settings_of_a_folder_import_nothing(
    options: list[str], trained: Path, tmp_path: Path, evil_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["export", *options, "--ckpt_path", str(trained), "--output", str(folder)]) == 0
    settings = yaml.safe_load((folder / "memlong.yaml").read_text())
    for evil, mine in (
        ({"selection": f"{evil_module}.selection"}, {"policy": "fifo"}),
        (
            {"retriever": settings["memory"]["retriever"] | {"name": f"{evil_module}.Encoder"}},
            {"retriever": {"batch_size": 2}},
        ),
        ({"policy": f"{evil_module}.policy"}, {}),
    ):
        (folder / "memlong.yaml").write_text(yaml.safe_dump(settings | {"memory": settings["memory"] | evil}))
        with pytest.raises(UserError, match=f"stored memory.{next(iter(evil))}.*='evil_module.*from you alone"):
            MemLong.from_pretrained(folder, mine)
    assert MemLong.from_pretrained(folder, {"policy": "fifo"}).retrieval.config.policy == "fifo"
    evil = {"model": settings["model"] | {"optimizer": {"class_path": f"{evil_module}.Optimizer"}}}
    (folder / "memlong.yaml").write_text(yaml.safe_dump(settings | evil))
    capsys.readouterr()
    assert "model.optimizer" in refused(["validate", *options, "--model.backbone", str(folder)], capsys)
    assert evil_module not in sys.modules
