"""What the README and the pages of the site say: every Python block runs, tables and links are right."""

import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from datamodules.documents import DocumentDataModule
from datamodules.local_text import LocalText
from lightning_memlong import MemLong
from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.config import MemoryConfig, ModelConfig, RetrieverConfig, TuningConfig
from lightning_memlong.model import export
from lightning_memlong.training import MemLongModule
from tests.integration.helpers import ROOT
from tests.pages import PAGES, README, blocks, every_command, links


def test_tests_in_the_readme_are_those_of_the_continuous_integration() -> None:
    assert "make test" in {command for command, page in every_command() if page == README}
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("\nmake lint test")


def test_the_table_of_settings_is_the_configuration() -> None:
    config = yaml.safe_load((ROOT / "conf" / "memlong.yaml").read_text())
    config["data"] = config["data"]["init_args"]
    text = "".join(page.read_text() for page in PAGES)
    rows = re.findall(r"^\| `((?:model|memory|data|trainer)\.[\w.]+)` \| `([^`]+)` \|", text, flags=re.M)
    assert len(rows) >= 30
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_pages_point_to_exist(page: Path) -> None:
    for target in links(page):
        file, _, heading = target.partition("#")
        there = (page.parent / file) if file else page
        assert there.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.M)
            assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


RUN_FOLDER = "runs/memlong/version_3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page == README else pytest.mark.long, id=page.stem) for page in PAGES
     if any(block.file is None for block in blocks(page, "python"))],
)  # fmt: skip
def test_python_blocks_run(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MEMLONG_CACHE")
    monkeypatch.chdir(tmp_path)
    text = Path(os.__file__).read_text()
    Path("book.txt").write_text(text[:6000])
    names: dict[str, Any] = {"text": text[:4000], "next_chapters": text[4000:6000], "another": text[6000:9000],
                             "book": text[9000:12000]}  # fmt: skip
    found = [block for block in blocks(page, "python") if block.file is None]
    if any('"exported"' in block.text for block in found):
        export(MemLong.from_pretrained("smollm2-135m"), "exported", load_tokenizer("smollm2-135m"))
    for block in found:
        exec(compile(block.text.replace(RUN_FOLDER, "smollm2-135m"), str(page), "exec"), names)
        assert "print(" not in block.text or len(capsys.readouterr().out) > 1
    assert all((tmp_path / "book.safetensors").exists() for block in found if "book.safetensors" in block.text)
