"""WikiText-103: good and featured articles of Wikipedia."""

import re
from collections.abc import Iterator, Sequence

from .documents import DocumentDataModule
from .hub import Hub
from .records import Document, Record, Shard

TITLE = re.compile(r"^ ?= (?!= )(.+?)(?<! =) = ?$")
"""`` = Title = ``; sub-headings have two or more signs on each side."""


class WikiText103(DocumentDataModule):
    """A document is an article: rows are lines, and ``= Title =`` after an empty line begins one.

    Sub-headings stay inside. An article that goes on in the next shard is read on there. On the hub:
    Salesforce/wikitext, configuration wikitext-103-raw-v1; locally also the original wiki.train.raw or .tokens.
    """

    name = "WikiText-103"
    hub = Hub("Salesforce/wikitext", "wikitext-103-raw-v1")
    lines_are_rows = True
    endings = (*DocumentDataModule.endings, ".raw", ".tokens")

    def documents(self, shards: Sequence[Shard], index: int, start: int = 0) -> Iterator[Document]:
        """Articles that begin in a shard; a line that cannot be read spoils its article."""
        begun: Record | None = None
        lines: list[str] = []
        problem: str | None = None
        for row, begins in self._lines(shards, index, start):
            if begun is not None and begins:
                yield self.document(shards, index, begun, "".join(lines), problem)
                begun = None
            if begun is None:
                if row.problem is None and not row.text.strip():
                    continue
                begun, lines, problem = row, [], None
            lines.append(row.text if row.text.endswith("\n") else f"{row.text}\n")
            problem = problem or (f"row {row.number + 1}: {row.problem}" if row.problem else None)
        if begun is not None:
            yield self.document(shards, index, begun, "".join(lines), problem)

    @staticmethod
    def _lines(shards: Sequence[Shard], index: int, start: int) -> Iterator[tuple[Record, bool]]:
        """Lines of the articles that begin in a shard, with whether one begins there."""
        empty, known = True, index == 0 or start > 0
        for row in shards[index].rows(start, by_line=True):
            begins = empty and TITLE.match(row.text.rstrip("\r\n")) is not None
            known = known or begins  # what comes before belongs to an article of the shard before
            empty = not row.text.strip() and row.problem is None
            if known:
                yield row, begins
        if not known:
            return
        for shard in shards[index + 1 :]:
            empty = True
            for row in shard.rows(by_line=True):
                if empty and TITLE.match(row.text.rstrip("\r\n")):
                    return
                empty = not row.text.strip() and row.problem is None
                yield row, False
