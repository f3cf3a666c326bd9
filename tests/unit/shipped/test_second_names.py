"""Two names of a package are one package; test_package.py has the same where it is installed."""

import importlib
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest

import callbacks
import callbacks.progress
import datamodules
import datamodules.pg19
from lightning_memlong.errors import UserError
from lightning_memlong.shipped import claim_names
from lightning_memlong.shipped.second_names import _Alias, add_second_names


def test_in_a_checkout_the_short_names_are_the_real_ones() -> None:
    assert importlib.import_module("lightning_memlong.datamodules") is datamodules
    other = importlib.import_module("lightning_memlong.datamodules.pg19")
    assert other is datamodules.pg19 and other.__spec__ is not None
    assert other.__spec__.name == other.__name__ == other.PG19.__module__ == "datamodules.pg19"
    assert importlib.import_module("lightning_memlong.callbacks.progress") is callbacks.progress
    assert pickle.loads(pickle.dumps(other.PG19)) is datamodules.PG19


@pytest.mark.parametrize("name", ["lightning_memlong.datamodules.nothing", "lightning_memlong.nothing"])
def test_what_is_not_there_is_not_found_by_either(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_names_are_claimed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.meta_path)
    claim_names()
    assert sys.meta_path == before, "in a checkout they are ours already"
    monkeypatch.setattr(sys, "meta_path", [finder for finder in before if not isinstance(finder, _Alias)])
    for folder in ("datamodules", "callbacks"):
        monkeypatch.delitem(sys.modules, folder)
    claim_names()
    claim_names()
    assert [f.name for f in sys.meta_path if isinstance(f, _Alias)] == ["callbacks", "datamodules"]


def test_a_name_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, _Alias)])
    taken = ModuleType("datamodules")
    taken.__file__ = "/home/me/datamodules/__init__.py"
    monkeypatch.setitem(sys.modules, "datamodules", taken)
    with pytest.raises(UserError, match="datamodules: /home/me/datamodules/__init__.py is loaded.*Fix: run memlong"):
        claim_names()


def test_a_checkout_beside_ones_own_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is found first by the short name is not ours, so there is no second name for ours by it."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").touch()
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, _Alias)])
    monkeypatch.syspath_prepend(str(tmp_path))
    add_second_names()
    assert [f.name for f in sys.meta_path if isinstance(f, _Alias)] == ["lightning_memlong.datamodules"]
