"""What mkdocs does beside its plugins: pages made from code, files from outside ``docs/``, drawings inside the page."""

import html
import posixpath
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "benchmarks/README.md")
"""Files that stay where GitHub looks for them, and are pages of the site as well; the README is its own."""
ASSETS = ("benchmarks/results",)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):(<code>)[~!]?")
DRAWING = re.compile(r'<img alt="([^"]*)" src="([^"]*drawings/([\w-]+)\.svg)" ?/?>')


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and the files from outside."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # the checkout's own code, whatever is installed
    from generated import all_pages

    for path, text in all_pages().items():
        files.append(File.generated(config, path, content=text))
    for name in OUTSIDE[1:]:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for folder in ASSETS:
        for file in sorted(f for f in (ROOT / folder).iterdir() if f.suffix in (".png", ".csv")):
            files.append(File.generated(config, f"{folder}/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave ``docs/``, or come from outside, at where the files are on the site."""
    source = page.file.src_uri
    here = PurePosixPath(source if source in OUTSIDE else f"docs/{source}").parent

    def pointed(found: re.Match[str]) -> str:
        target = found[2]
        if ":" in target or target.startswith("/"):
            return found[0]
        at = posixpath.normpath(str(here / target))
        at = "docs/index.md" if at == "README.md" else at
        there = at.removeprefix("docs/")
        if not (ROOT / at).exists() and files.get_file_from_path(there) is None:
            return found[0]  # mkdocs tells it
        return found[1] + posixpath.relpath(there, posixpath.dirname(source) or ".") + found[3]

    return LINK.sub(pointed, _floors(markdown))


def _floors(markdown: str) -> str:
    """The Mermaid chart of CONTRIBUTING.md as a list: its script would come from another server."""

    def listed(chart: re.Match[str]) -> str:
        return "\n".join(f"{n}. {name}" for n, name in enumerate(re.findall(r'\["(.+?)"\]', chart[1]), 1))

    return re.sub(r"```mermaid\nflowchart TD\n(.*?)```", listed, markdown, flags=re.S)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Put drawings into the page, so that they follow its colours, and take Sphinx's roles out of docstrings."""
    return DRAWING.sub(_drawn, ROLE.sub(r"\1", content))


def _drawn(image: re.Match[str]) -> str:
    file = ROOT / "docs" / "drawings" / f"{image[3]}.svg"
    svg = re.sub(r"<style>.*?</style>", "", file.read_text(), flags=re.S)
    title = html.escape(html.unescape(image[1]), quote=True)
    svg = svg.replace("<svg ", f'<svg class="drawing" role="img" aria-label="{title}" ', 1)
    return f'<span class="drawing-frame" tabindex="0">{svg}</span>'
