"""What was read, as a person reads it: pages of sentences, each with its place in tokens."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PAGE = 512
"""Tokens of a page."""
SHORTEST = 4
"""Tokens before which a full stop ends nothing: an abbreviation, most likely."""
LONGEST = 96
"""Tokens after which a sentence is cut, since lists and tables end nowhere."""
TOGETHER = 16
"""Tokens decoded together: what a token says may depend on the one before it."""
UNFINISHED = "\ufffd"
"""What a tokenizer writes for a character of which not all bytes are there yet."""
END = re.compile(r"""[.!?…]["'”’)\]]*\s*$""")
"""What a sentence ends with."""


@dataclass(frozen=True)
class Sentence:
    """A piece of the book that can be asked about."""

    start: int
    """Its first token [tokens]."""
    end: int
    """The place after its last one [tokens]."""
    text: str


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to a text; a character of several tokens stands with its last one.

    Args:
        tokenizer: Whose ids they are.
        ids: (n,) of a text.
    """
    found: list[str] = []
    begin, shown = 0, ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)
        if whole.endswith(UNFINISHED) and end < len(ids):
            found.append("")
            continue
        found.append(whole[len(shown) :])
        if end - begin > TOGETHER:
            begin, whole = end - 1, tokenizer.decode(ids[end - 1 : end], clean_up_tokenization_spaces=False)
        shown = whole
    return found


class Book:
    """The text of a bank's row.

    Args:
        tokens: (T,) ids of all that was read.
        tokenizer: Whose ids they are.
        page: Tokens of a page.
    """

    def __init__(self, tokens: Sequence[int], tokenizer: Any, page: int = PAGE) -> None:
        self._tokens, self._tokenizer, self._page = list(tokens), tokenizer, page

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def pages(self) -> int:
        """How many there are."""
        return -(-len(self) // self._page)

    def page_of(self, place: int) -> int:
        """The page a token is on."""
        return place // self._page

    def ids(self, start: int, end: int) -> list[int]:
        """Token ids between two places."""
        return self._tokens[start:end]

    def pieces(self, start: int, end: int) -> list[str]:
        """What each token between two places adds to the text."""
        return pieces(self._tokenizer, self._tokens[start:end])

    def text(self, start: int, end: int) -> str:
        """The text between two places."""
        return str(self._tokenizer.decode(self._tokens[start:end], clean_up_tokenization_spaces=False))

    def page(self, number: int) -> list[Sentence]:
        """The sentences of a page; what stands on two pages is two."""
        start = number * self._page
        return list(self._sentences(start, min(start + self._page, len(self))))

    def _sentences(self, start: int, end: int) -> Iterator[Sentence]:
        parts = self.pieces(start, end)
        begin, text = start, ""
        for place, piece in enumerate(parts, start + 1):
            text += piece
            following = parts[place - start] if place < end else ""
            ends = place - begin >= SHORTEST and bool(END.search(text)) and following[:1].isspace()
            ends |= "\n\n" in piece and bool(text.strip())
            if ends or place - begin >= LONGEST or place == end:
                yield Sentence(begin, place, text)
                begin, text = place, ""
