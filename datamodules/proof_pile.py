"""Proof-Pile: mathematical text, from papers, textbooks, forums and proof assistants."""

from .documents import DocumentDataModule
from .hub import Hub


class ProofPile(DocumentDataModule):
    """A document is a file or a paper: a row of the data set, or a text file.

    On the hub: hoskinson-center/proof-pile, whose own loading script is not run: its JSON files are read directly.
    """

    name = "Proof-Pile"
    hub = Hub(
        "hoskinson-center/proof-pile",
        files={"train": "train/*.jsonl.gz", "validation": "dev/*.jsonl.gz", "test": "test/*.jsonl.gz"},
    )
    endings = (*DocumentDataModule.endings, ".tex", ".lean", ".thy", ".v", ".miz", ".mm")
