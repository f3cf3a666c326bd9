"""Exporting with a model card, pushing to a hub on this machine, and loading from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from lightning_memlong.cli.main import main
from lightning_memlong.cli.push import check_push, push
from lightning_memlong.errors import UserError
from tests.hub import TOKEN, FakeHub
from tests.integration.helpers import ROOT, tiny


def folder_of_three(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "README.md").write_text("# mine\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def test_a_folder_is_pushed_and_pushed_again(hub: FakeHub, tmp_path: Path) -> None:
    folder = folder_of_three(tmp_path)
    check_push("me/mine", True)
    assert not (hub.root / "models").exists(), "nothing is made before there is something to push"
    assert push(folder, "me/mine", True) == f"{hub.address}/me/mine"
    there = hub.root / "models" / "me" / "mine"
    assert {f.name: f.read_bytes() for f in there.iterdir()} == {f.name: f.read_bytes() for f in folder.iterdir()}
    assert hub.private == {"me/mine"}
    (folder / "config.json").write_text("[]")
    check_push("me/mine", None)
    push(folder, "me/mine", None)
    assert (there / "config.json").read_text() == "[]"


@pytest.mark.parametrize(
    "name, private, words",
    [
        ("mine", None, "push_to_hub='mine' cannot be used. Allowed: owner/name"),
        ("me/mine too", None, "push_to_hub='me/mine too' cannot be used"),
        ("you/mine", None, "push_to_hub='you/mine' cannot be used. Allowed: the accounts of the token, me"),
        ("me/public", True, "private=True cannot be used. Allowed: false: me/public is there, and public"),
    ],
)
def test_what_cannot_be_is_told_beforehand(
    name: str, private: bool | None, words: str, hub: FakeHub, tmp_path: Path
) -> None:
    push(folder_of_three(tmp_path), "me/public", False)
    with pytest.raises(UserError) as error:
        check_push(name, private)
    assert str(error.value).startswith(words) and "Fix:" in str(error.value) and "\n" not in str(error.value)


def test_a_token_that_is_none_and_a_hub_that_is_not_there(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="me/mine'.*token is not accepted.*HF_TOKEN"):
        check_push("me/mine", None)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no tokens"))
    with pytest.raises(UserError, match="there is no token.*hf auth login"):
        check_push("me/mine", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"the hub cannot be reached \(.+\)\. Allowed: a hub that answers at http://127"
    ):
        check_push("me/mine", None)


@pytest.mark.parametrize("refused", ["/create", "/preupload/", "/commit/"])
def test_a_push_that_fails_says_how_to_go_on(refused: str, hub: FakeHub, tmp_path: Path) -> None:
    folder = folder_of_three(tmp_path)
    hub.refuses = refused
    with pytest.raises(UserError) as error:
        push(folder, "me/mine", None)
    assert "the hub refuses it (the disk is full)" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith(f"The folder {folder} is whole; upload it with: hf upload me/mine {folder}")


def test_nothing_is_pushed_when_the_export_fails(
    hub: FakeHub, tiny_backbone: Path, text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = tiny(tiny_backbone, text_folder, tmp_path / "runs")
    (tmp_path / "there").mkdir()
    assert main(["export", *options, "--output", str(tmp_path / "there"), "--push_to_hub", "me/mine"]) == 2
    assert "does not exist yet" in capfd.readouterr().err and not (hub.root / "models").exists()
    assert main(["export", *options, "--output", str(tmp_path / "new"), "--push_to_hub", "you/mine"]) == 2
    assert "the accounts of the token" in capfd.readouterr().err and not (tmp_path / "new").exists()


def test_private_without_a_push_is_told() -> None:
    with pytest.raises(UserError, match="private=False.*null without --push_to_hub"):
        check_push(None, False)
    check_push(None, None)


@pytest.mark.long
def test_a_run_is_exported_with_its_card_pushed_and_loaded_from_the_hub(
    hub: FakeHub, tiny_backbone: Path, text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = tiny(tiny_backbone, text_folder, tmp_path / "runs")
    gated = ["--model.fusion", "gated", "--model.retrieval_layers", "[1, 2]"]
    assert main(["fit", *options, *gated]) == 0
    exported = ["--ckpt_path", "last", "--output", str(tmp_path / "exported"), "--push_to_hub", "me/mine"]
    capfd.readouterr()
    assert main(["export", *options, *exported]) == 0
    assert f"Pushed: {hub.address}/me/mine" in capfd.readouterr().out
    card = ModelCard.load(tmp_path / "exported" / "README.md")
    assert card.data.library_name == "transformers" and "4 optimiser steps on LocalText" in card.text
    assert "| after training | " in card.text and "`model.fusion` | `gated`" in card.text
    assert 'MemLong.from_pretrained("me/mine")' in card.text and str(tmp_path) not in str(card)
    code = (
        "import sys; from lightning_memlong import MemLong; a, b = map(MemLong.from_pretrained, sys.argv[1:]); "
        "assert a.settings() == b.settings() and a.layout.fusion == 'gated', (a, b); "
        "assert a.long_context.config == b.long_context.config; "
        "assert all((a.gates[k] == b.gates[k]).all() for k in b.gates) and len(a.gates); print('same')"
    )
    env = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", code, "me/mine", str(tmp_path / "exported")]
    done = subprocess.run(command, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr
