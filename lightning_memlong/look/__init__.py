"""A page beside a memory: what each sentence of a book retrieved, how it is attended to, and which tokens gain."""

from callbacks.figures import draw_heads, draw_map
from lightning_memlong.look.attended import Attended, Chunk
from lightning_memlong.look.book import Book, Sentence
from lightning_memlong.look.looker import Looker, Sight
from lightning_memlong.look.question import Question, Written

__all__ = ["Attended", "Book", "Chunk", "Looker", "Question", "Sentence", "Sight", "Written", "draw_heads", "draw_map"]
