"""DataModules: documents in, windows out. Each reads one corpus as streams of documents.

A corpus of one's own is a subclass of :class:`DocumentDataModule` that says where it is (a :class:`Hub`) and, unless a
document is a row or a file, what its ``documents`` are, made of the :class:`Record` s of a :class:`Shard`.
"""

from .bookcorpus import BookCorpus
from .documents import DocumentDataModule
from .hub import Hub
from .local_text import LocalText
from .pg19 import PG19
from .proof_pile import ProofPile
from .records import Columns, Document, Record, Shard
from .synthetic_recall import SyntheticRecall
from .wikitext103 import WikiText103

__all__ = [
    "PG19",
    "BookCorpus",
    "Columns",
    "Document",
    "DocumentDataModule",
    "Hub",
    "LocalText",
    "ProofPile",
    "Record",
    "Shard",
    "SyntheticRecall",
    "WikiText103",
]
