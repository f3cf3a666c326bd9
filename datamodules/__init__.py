"""DataModules: documents in, windows out. Each reads one corpus as streams of documents.

A corpus of one's own is a subclass of :class:`DocumentDataModule` that says where it is (a :class:`Hub`) and, unless a
document is a row or a file, what its ``documents`` are, made of the :class:`Record` s of a :class:`Shard`.
"""

from datamodules.bookcorpus import BookCorpus
from datamodules.documents import DocumentDataModule
from datamodules.hub import Hub
from datamodules.local_text import LocalText
from datamodules.pg19 import PG19
from datamodules.proof_pile import ProofPile
from datamodules.records import Columns, Document, Record, Shard
from datamodules.synthetic_recall import SyntheticRecall
from datamodules.wikitext103 import WikiText103

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
