"""Retrieval for a text that is given, not for a place in a document: a question, an example, or what was just written.

Legend: B texts that ask, E embedding size, k chunks retrieved.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.retrieval.queries import Asking, search
from lightning_memlong.retrieval.retrieval import Retrieval, seed_of
from lightning_memlong.retrieval.retriever import HiddenRetriever

if TYPE_CHECKING:
    from lightning_memlong.model.model import MemLong


@torch.no_grad()
def embed_texts(
    model: "MemLong",
    retrieval: Retrieval,
    texts: Sequence[str],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Embeddings (B, E) of texts; for retriever ``hidden`` the model reads each of them."""
    if not isinstance(retrieval.retriever, HiddenRetriever):
        return retrieval.retriever.to(model.device).encode(list(texts))
    found = []
    for text in texts:
        ids = torch.tensor([retrieval.tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device)
        with autocast():
            found.append(model.capture(ids, hidden=True)["hidden"][0].float().mean(0).cpu())
    return F.normalize(torch.stack(found), dim=1)


def retrieve_for(
    retrieval: Retrieval, bank: BankView, asking: Sequence[Tensor], before: int | None = None, count: bool = False
) -> Retrieved | None:
    """What each of B texts retrieves from a bank of one row: a record of B rows, or None if there is nothing.

    Args:
        retrieval: How; with the controls ``recent`` and ``random`` it does not matter who asks.
        bank: Where from.
        asking: Of each text, the embeddings (n, E) of what asks.
        before: Only entries that end here or before [tokens]; None: all.
        count: Whether the counters of what is retrieved go up.
    """
    config = retrieval.config
    limit = torch.tensor([torch.iinfo(torch.long).max if before is None else before])
    if config.selection == "recent":
        places = bank.recent(config.top_k, limit)
        return bank.gather(places[:, None].expand(-1, len(asking), -1), count=count)
    if config.selection == "random":
        drawn = [bank.random(config.top_k, [seed_of(config.seed, int(bank.ends()[0]), n)], limit)
                 for n in range(len(asking))]  # fmt: skip
        return bank.gather(torch.stack(drawn, dim=1), count=count)
    ask = Asking(config.query_chunks, config.query_pooling, retrieval.retriever.as_query)
    known = cache(lambda: bank.embeddings_within(limit)[0])
    queries = torch.stack([ask(held, known) for held in asking])[None]
    scores, entries = search(bank, queries, config.top_k, limit)
    return bank.gather(entries, scores, count)
