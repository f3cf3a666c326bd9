"""Retrieval for a text that is given, not for a place in a document: a question, or an example to be classified."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank import MemoryBank
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.query import Asking, search
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.retriever import HiddenRetriever


@torch.no_grad()
def embed_texts(subject: Subject, retrieval: Retrieval, texts: Sequence[str]) -> Tensor:
    """Embeddings (B, E) of texts; for retriever ``hidden`` the model reads each of them."""
    if not isinstance(retrieval.retriever, HiddenRetriever):
        return retrieval.retriever.encode(list(texts))
    found = []
    for text in texts:
        ids = torch.tensor([subject.tokenizer(text, add_special_tokens=False)["input_ids"]], device=subject.device)
        with subject.autocast():
            found.append(subject.model(ids, logits_to_keep=1).memory_hidden[0].float().mean(0).cpu())
    return F.normalize(torch.stack(found), dim=1)


def retrieve_for(retrieval: Retrieval, bank: MemoryBank, embedded: Tensor, before: int | None = None) -> Any:
    """What each of B texts (B, E) retrieves from a bank of one row: a record of B rows.

    Args:
        retrieval: How.
        bank: Where from.
        embedded: What asks.
        before: Only entries that end here or before [tokens]; None: all.
    """
    asking = Asking(1, "mean", retrieval.retriever.as_query)
    limit = torch.tensor([torch.iinfo(torch.long).max if before is None else before])
    known = cache(lambda: bank.embeddings_within(limit)[0])
    queries = torch.stack([asking(e[None], known) for e in embedded])[None]
    scores, entries = search(bank, queries, retrieval.config.top_k, limit)
    return bank.gather(entries, scores, count=False)
