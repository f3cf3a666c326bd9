"""The README and the pages of ``docs/`` as tests see them: their commands, blocks and links."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
SOON = ("tutorials/your-text.md", "tutorials/extend.md", "how-to/corpora.md", "how-to/evaluate.md")
FIRST = (README, *(ROOT / "docs" / page for page in SOON))
"""Pages whose commands the default tests run; those of the others take minutes in all."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file it stands for, where its first line is a comment with its name."""
        named = re.match(r"# ([\w./-]+\.(?:py|yaml))$", self.text.partition("\n")[0])
        return named[1] if named else None


def blocks(page: Path, *languages: str) -> list[Block]:
    """Fenced blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    return [Block(page, language, text) for language, text in found if language in languages]


def commands(page: Path) -> list[str]:
    """Commands of a page, each on one line."""
    text = "".join(block.text for block in blocks(page, "bash", "sh", "shell", "console")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#\s.*", "", line).strip() for line in text.splitlines())
    return [" ".join(line.split()) if "'" not in line else line for line in lines if line and line[0] != "#"]


def every_command() -> Iterator[tuple[str, Path]]:
    """Each command once, with the first page it stands on; pages that the default tests run come first."""
    seen: set[str] = set()
    for page in [*FIRST, *(page for page in PAGES if page not in FIRST)]:
        for command in commands(page):
            if command not in seen:
                seen.add(command)
                yield command, page


def files_of(page: Path) -> dict[str, str]:
    """Files that a page has the reader write, with their content."""
    named = ((block.file, block.text) for block in blocks(page, "python", "yaml"))
    return {file: text for file, text in named if file is not None and "/" not in file}


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures that are no addresses."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text)
