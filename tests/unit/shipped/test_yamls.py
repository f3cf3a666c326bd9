"""Shipped YAML files are found by their names from anywhere; files that are there come first."""

from pathlib import Path

import pytest

from lightning_memlong.errors import UserError
from lightning_memlong.shipped import CONF, find_yaml, hides_packaged, packaged_names
from tests.house import ROOT


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_in_a_checkout_they_are_those_at_its_top() -> None:
    assert ROOT / "conf" == CONF
    assert packaged_names() == sorted(f.relative_to(CONF).as_posix() for f in CONF.rglob("*.yaml"))


@pytest.mark.parametrize("name", ["eval/perplexity.yaml", "conf/eval/perplexity.yaml", "./conf/eval/perplexity.yaml"])
def test_a_packaged_file_is_found_where_there_is_none(name: str) -> None:
    assert find_yaml(name) == str(CONF / "eval" / "perplexity.yaml") and hides_packaged(name) is None


@pytest.mark.parametrize("name", ["memlong.yaml", "conf/memlong.yaml"])
def test_a_file_that_is_there_wins(name: str) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("memory: {top_k: 2}\n")
    assert find_yaml(name) == name and hides_packaged(name) == CONF / "memlong.yaml"


def test_the_shipped_file_itself_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert find_yaml("conf/memlong.yaml") == "conf/memlong.yaml" and hides_packaged("conf/memlong.yaml") is None


@pytest.mark.parametrize(
    "name, fix",
    [
        ("memlng.yaml", "did you mean memlong.yaml?"),
        ("conf/perplexity.yaml", "did you mean eval/perplexity.yaml?"),
        ("eval", "correct it."),
        ("conf/../pyproject.toml", "correct it."),
        ("", "correct it."),
    ],
)
def test_an_unknown_name_is_told_with_those_there_are(name: str, fix: str) -> None:
    with pytest.raises(UserError) as error:
        find_yaml(name, "file")
    told = str(error.value)
    assert told.startswith(f"file={name!r}: no such file here") and told.endswith(f"Fix: {fix}")
    assert all(known in told for known in packaged_names())
