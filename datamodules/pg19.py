"""PG-19: books of Project Gutenberg published before 1919."""

from .documents import DocumentDataModule
from .hub import Hub


class PG19(DocumentDataModule):
    """A document is a book: a row of the data set, or a text file.

    On the hub: emozilla/pg19, the same 28,602 / 50 / 100 books as deepmind/pg19, which only loads through a script.
    """

    name = "PG-19"
    hub = Hub("emozilla/pg19")
