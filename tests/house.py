"""The floors and rooms of the house as text, made from the contract in pyproject.toml and from the rooms' own words.

python -m tests.house      # writes them into CONTRIBUTING.md
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"


def floors() -> list[list[str]]:
    """Modules side by side, from the top floor down."""
    contract = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^layers = \[(.*?)^\]", contract, re.S | re.M)
    assert block is not None
    return [line.split(" | ") for line in re.findall(r'"([^"]+)"', block[1])]


def short(module: str) -> str:
    """How a room is called on the page."""
    return module.removeprefix("lightning_memlong.")


def picture() -> str:
    """The floors as a Mermaid chart."""
    lines = []
    for number, rooms in enumerate(floors()):
        lines.append(f'  f{number}["{" · ".join(map(short, rooms))}"]')
        if number:
            lines.append(f"  f{number - 1} --> f{number}")
    return "\n".join(lines)


def first_line(module: str) -> str:
    """What a room is for, in the first line of its door or file."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]


def rooms() -> str:
    """A line a room."""
    lines = [f"| `{short(module)}` | {first_line(module)} |" for rooms in floors() for module in rooms]
    return "\n".join(["| room | what it is for |", "|---|---|", *lines])


def page(text: str) -> str:
    """The page with floors and rooms as they are now."""
    text = re.sub(r"(?<=flowchart TD\n).*?(?=\n```)", lambda _: picture(), text, flags=re.S)
    return re.sub(r"\| room \| what it is for \|\n.*?(?=\n\n)", lambda _: rooms(), text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
