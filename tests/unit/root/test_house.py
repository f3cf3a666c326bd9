"""The house is as CONTRIBUTING.md draws it, and stays readable: rooms, doors, sizes of files and functions."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import PAGE, ROOT, first_line, floors, page

CORE = ROOT / "lightning_memlong"
PACKAGES = [CORE, ROOT / "callbacks", ROOT / "datamodules"]
FOLDERS = {".ci", ".github", "benchmarks", "callbacks", "conf", "datamodules", "docs", "lightning_memlong", "tests"}


def files() -> list[Path]:
    return [file for package in PACKAGES for file in sorted(package.rglob("*.py"))]


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Functions of a file and their lines, without docstring."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            documented = (first.end_lineno or 0) - first.lineno + 1 if text else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - documented


def test_the_page_shows_the_floors_and_rooms() -> None:
    text = PAGE.read_text()
    assert page(text) == text, "run: python -m tests.house"


def test_no_folder_is_kept_that_belongs_to_a_run() -> None:
    listed = subprocess.run(["git", "ls-files", "*/*"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.partition("/")[0] for name in listed.stdout.splitlines()} <= FOLDERS


def test_fifteen_rooms_and_five_files() -> None:
    rooms = {folder.name for folder in CORE.iterdir() if (folder / "__init__.py").exists()}
    top = {file.name for file in CORE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(rooms) == 15 and len(top) <= 5, (rooms, top)
    named = {name.removeprefix("lightning_memlong.") for floor in floors() for name in floor}
    assert named == rooms | {name.removesuffix(".py") for name in top} | {"callbacks", "datamodules"}


@pytest.mark.parametrize("module", [module for floor in floors() for module in floor])
def test_every_room_says_in_one_line_what_it_is_for(module: str) -> None:
    assert first_line(module).endswith(".") and len(first_line(module)) < 120


@pytest.mark.parametrize("folder", ["callbacks", "datamodules"])
def test_folders_with_two_names_import_themselves_by_neither(folder: str) -> None:
    """Else their modules would be loaded twice, or not at all, in an installed package."""
    nodes = [node for file in sorted((ROOT / folder).rglob("*.py")) for node in ast.walk(ast.parse(file.read_text()))]
    absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    absolute |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    tops = {str(name).partition(".")[0] for name in absolute}
    assert "lightning_memlong" in tops and not {"callbacks", "datamodules"} & tops


def test_files_and_functions_stay_small() -> None:
    long = [(str(f), n) for f in files() if (n := len(f.read_text().splitlines())) > 300]
    long += [(f"{f}:{name}", n) for f in files() for name, n in functions(f) if n > 45]
    assert not long
