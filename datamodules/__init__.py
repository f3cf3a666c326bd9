"""DataModules: documents in, windows out. Each reads one corpus as streams of documents."""

from datamodules.bookcorpus import BookCorpus
from datamodules.local_text import LocalText
from datamodules.pg19 import PG19
from datamodules.proof_pile import ProofPile
from datamodules.synthetic_recall import SyntheticRecall
from datamodules.wikitext103 import WikiText103

__all__ = ["PG19", "BookCorpus", "LocalText", "ProofPile", "SyntheticRecall", "WikiText103"]
