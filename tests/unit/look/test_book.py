"""A book's text in pages, sentences and pieces; and what is drawn of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lightning_memlong.look import Attended, Book, Chunk, Sight
from lightning_memlong.look.attended import attended
from lightning_memlong.look.book import LONGEST, pieces
from lightning_memlong.look.drawing import coloured_tokens, draw_written, similarity, strip, worth
from lightning_memlong.model import Watch

TEXT = 'He said "No." She left. Mr. Ahab – café – 🐳 swam!\n\nA new part, which goes on. ' + "one, two, " * 30


@pytest.fixture(scope="module")
def tokenizer(byte_backbone: Path) -> Any:
    return AutoTokenizer.from_pretrained(byte_backbone)


def test_pieces_are_the_text(tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) == len(TEXT.encode()) and "".join(found) == TEXT
    assert "🐳" in found and "é" in found, "whole with its last byte"
    assert "".join(pieces(tokenizer, ids[:46])) == tokenizer.decode(ids[:46]), "cut in the middle of a character"


def test_sentences_are_the_text(tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    book = Book(ids, tokenizer, page=len(ids))
    sentences = book.page(0)
    assert "".join(s.text for s in sentences) == TEXT and book.pages == 1
    assert [s.start for s in sentences[1:]] == [s.end for s in sentences[:-1]]
    assert [s.text for s in sentences][:2] == ['He said "No."', " She left."]
    assert max(s.end - s.start for s in sentences) == LONGEST
    small = Book(ids, tokenizer, page=100)
    pages = [s for number in range(small.pages) for s in small.page(number)]
    assert pages[0].start == 0 and pages[-1].end == len(ids) and small.page_of(pages[-1].start) == small.pages - 1


def chunk(start: int, text: str = "text", similar: float = 0.5) -> Chunk:
    return Chunk(start, start + 4, similar, text)


def sight(*texts: str, on: float = 1.0) -> Sight:
    n = len(texts)
    shares = torch.rand(2, 3, n, 2, generator=torch.Generator().manual_seed(0)) / 4
    return Sight([chunk(0), chunk(8)], [1, 2], shares, 20, [*texts], torch.full((n,), on), torch.full((n,), 2.0))


def test_what_a_book_says_is_text_and_no_page() -> None:
    html = coloured_tokens(sight("<script>alert(1)</script>", ' onclick="x"', "a\nb"))
    assert "<script" not in html and "&lt;script&gt;" in html and "&quot;x&quot;" in html and "a⏎<br>b" in html
    assert 'title="loss 2.00 without memory, 1.00 with it"' in html and "31, 119, 180, 0.425" in html
    assert "230, 120, 20, 0.850" in coloured_tokens(sight("x", on=9.0)), "never more than full"


def test_lines_tell_what_memory_is_worth() -> None:
    assert "perplexity -63.2 %" in worth(sight("a")) and "perplexity +171.8 %" in worth(sight("a", on=3.0))
    nothing = Sight([], [], torch.zeros(0, 0, 1, 0), 0, ["a"], torch.ones(1), torch.ones(1))
    assert "nothing is retrieved" in worth(nothing)
    assert similarity(chunk(0)) == "similarity 0.50" and similarity(chunk(0, similar=float("nan"))) == ""


def test_a_strip_marks_the_page_the_sentence_and_its_chunks() -> None:
    assert strip(100, (0, 10), None, None).count("<rect") == 1
    found = sight("a")
    marked = strip(100, (20, 30), found, found.start)
    assert marked.count("<rect") == 4 and 'x="200.0"' in marked and "tokens 8 to 12:" in marked


def test_a_picture_has_a_row_a_chunk_and_a_column_a_token() -> None:
    found = sight("a", "$b$", "\n")
    axes = draw_written(found, found.pieces).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "8"]
    assert axes.get_images()[0].get_array().shape == (2, 3)
    torch.testing.assert_close(torch.tensor(axes.get_images()[0].get_array()), 100 * found.by_token())


class Numbers:
    """A tokenizer of numbers."""

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids.tolist()))


def test_sets_that_follow_one_another_become_one_table() -> None:
    """Two sets of two chunks, of which they share one; a place where nothing was retrieved; a pass under way."""
    from types import SimpleNamespace

    row = SimpleNamespace(tokens=torch.arange(40))
    facts = SimpleNamespace(positions=torch.tensor([0, 4, 8]), lengths=torch.tensor([4, 4, 3]))
    bank: Any = SimpleNamespace(entries=lambda _: facts, row=lambda _: row, chunk_size=4)
    watch = Watch(1)

    def begin(places: list[int], scores: list[float]) -> Any:
        record: Any = SimpleNamespace(
            positions=torch.tensor([places]), scores=torch.tensor([scores]), length=None, mask=torch.ones(1, 8),
            chunk_size=4,
        )  # fmt: skip
        return watch.begin(record)

    first = begin([-1, 0, 4], [float("nan"), 0.5, 0.7])
    for value in (0.1, 0.2):
        for layer in (1, 2):
            first.note(layer, torch.full((1, 3, 1, 3), value))
    second = begin([4, 8], [0.9, 0.4])
    second.note(1, torch.full((1, 3, 1, 2), 0.3))
    second.note(2, torch.full((1, 3, 1, 2), 0.3))
    second.note(1, torch.full((1, 3, 1, 2), 9.0))  # the second layer is yet to come
    begin([0], [0.1])  # and nothing has read it
    found: Attended = attended(watch.sets, 3, bank, Numbers())
    assert [(c.start, c.end, round(c.similarity, 2), c.text) for c in found.chunks] == [
        (0, 4, 0.5, "0 1 2 3"), (4, 8, 0.9, "4 5 6 7"), (8, 11, 0.4, "8 9 10")
    ]  # fmt: skip
    expected = torch.tensor([[0.1, 0.2, 0.0], [0.1, 0.2, 0.3], [0.0, 0.0, 0.3]])
    torch.testing.assert_close(found.by_token(), expected)
    assert found.layers == [1, 2] and found.attention.shape == (2, 3, 3, 3)
