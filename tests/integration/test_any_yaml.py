"""Any key of the shipped configuration with any value: the run ends well, or one line says what is wrong."""

import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from lightning_memlong.cli.main import main
from lightning_memlong.cli.parser import typed_option
from lightning_memlong.config import flat
from tests.integration.helpers import CONFIG, ROOT, tiny

KEYS = sorted(flat(yaml.safe_load((ROOT / CONFIG).read_text())))
NUMBERS = [-1, 0, 1, 3, 0.5, -0.5, 1e30, float("nan"), float("inf"), "1e5"]
VALUES = [None, True, False, *NUMBERS, "", "x", "../x", "é\n\x01", [], [1, "a", None], [[1]], {}, {"a": 1},
          {"class_path": "x.Y"}, {"class_path": "torch.nn.Linear"}]  # fmt: skip


def nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key and its value as a file has them."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def without(options: list[str], key: str) -> list[str]:
    """Typed options but that one, which would win over a file."""
    name = f"--{typed_option(key)}"
    at = options.index(name) if name in options else None
    return options if at is None else [*options[:at], *options[at + 2 :]]


@pytest.fixture(autouse=True)
def back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder it began in once it is over."""
    monkeypatch.chdir(ROOT)


@pytest.mark.long
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KEYS), st.sampled_from(VALUES))
def test_any_value(
    tiny_backbone: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    os.chdir(tmp_path)  # where a folder of any name may be made
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(nested(key, value)))
    short = {"validate_first": "false", "trainer.max_steps": "2", "trainer.limit_val_batches": "1"}
    short["trainer.max_time"] = "00:00:00:20"  # some values let it go on for ever
    options = tiny(tiny_backbone, text_folder, tmp_path / "runs")
    options += [word for name, one in short.items() for word in (f"--{name}", one)]
    try:
        status = main(["fit", *without(options, key), "--config", str(file)])
    except SystemExit as stop:  # the parser's own
        status = stop.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert status in (0, 2) and (status == 0 or "error: " in said), f"{key}={value!r}: {status}, {said[-500:]}"
