"""The README stays short, every page of the site can be found, and its options are those of the code."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pages import PAGES, README, ROOT

sys.path.insert(0, str(ROOT / "docs" / "made"))
import generated  # noqa: E402
from options import Option, options_of  # noqa: E402

OUTSIDE = {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "benchmarks/README.md"}


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose address comes from the environment."""


Loader.add_constructor("!ENV", lambda loader, node: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def nav(entries: Any) -> list[str]:
    """Pages of the navigation."""
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for value in values for page in nav(value)]


def options() -> list[Option]:
    return [
        option
        for _, sections in generated.OPTIONS.values()
        for section in sections
        for option in options_of(section.make, section.group, section.leave_out)
    ]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_every_page_is_in_the_navigation_once() -> None:
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page != README}
    found = nav(SITE["nav"])
    assert len(found) == len(set(found))
    assert set(found) == written | {*generated.all_pages()} | OUTSIDE


def test_every_option_says_what_it_is_and_what_is_allowed() -> None:
    found = {option.key: option for option in options()}
    assert len(found) > 120
    assert all(o.text and o.default and o.allowed and "Any" not in o.allowed for o in found.values())
    assert found["memory.top_k"] == Option(
        "memory.top_k", "3", "Chunks read. Paper, section 3: 8.", "chunks", "1 or more"
    )
    assert found["memory.use"].allowed == "one of retrieved, attention"
    assert found["model.position"].allowed == "one of fixed, sequential, zero", "checked in the code, not by the type"
    assert found["memory.policy"].allowed.startswith("retrieval_frequency, fifo, lru, score, none, or the import path")
    assert found["data.stride"].allowed == "null, or a multiple of memory.chunk_size, at most data.window"
    assert found["evaluation.protocol"].default == "sliding" and found["search.trials"].allowed == "1 or more"


def test_every_option_of_the_default_file_is_on_a_page() -> None:
    ours = {
        key for key in generated.SHIPPED if not re.match(r"model\.(optimizer|scheduler)\.|(data|model)\.class", key)
    }
    assert ours - {"data.class_path"} <= {option.key for option in options()}


def test_every_shipped_evaluation_is_on_the_page_of_its_options() -> None:
    shown = {section.make.__name__: section.text for section in generated.OPTIONS["evaluation"][1]}
    for file in sorted((ROOT / "conf" / "eval").glob("*.yaml")):
        kind = yaml.safe_load(file.read_text())["evaluation"]["class_path"].rpartition(".")[2]
        assert file.name in shown[kind].replace("conf/eval/", "")


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_needs_no_other_server(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert len(pages) > 40
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\"\s>]+)", page)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*href=\"?([^\"\s>]+)", page)
        assert not [address for address in loaded if address.startswith(("http", "//"))], name
    method, memory = pages["explanation/method/index.html"], pages["reference/options/memory/index.html"]
    assert method.count('class="drawing"') == 5 and "prefers-color-scheme:dark" not in method
    assert "allowed: one of retrieved, attention" in memory
    assert "from_pretrained" in pages["reference/python/memlong/index.html"]
    assert ":class:" not in "".join(pages.values()) and ":meth:" not in "".join(pages.values())
