"""Retrieval for a text that is given, not for a place in a document: a question, an example, or what was just written.

Legend: B texts that ask, n chunks of one, E embedding size, k chunks retrieved.
"""

from collections.abc import Callable, Sequence
from functools import cache
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.retrieval.queries import QueryBuilder
from lightning_memlong.retrieval.retrieval import Retrieval
from lightning_memlong.retrieval.selection import Request, seed_of

HiddenStates = Callable[[Tensor], Tensor]
"""Gives the memory layer's hidden states (1, T, E) of tokens (1, T)."""


@torch.no_grad()
def embed_texts(
    retrieval: Retrieval, texts: Sequence[str], device: torch.device, hidden_states: HiddenStates
) -> Tensor:
    """Embeddings (B, E) of texts.

    Args:
        retrieval: Whose encoder.
        texts: What is embedded.
        device: Where.
        hidden_states: The model, for an encoder that needs hidden states: it reads each text.
    """
    if not retrieval.retriever.needs_hidden:
        retrieval.settle()
        return retrieval.retriever.to(device).encode(list(texts))
    found = []
    for text in texts:
        ids = torch.tensor([retrieval.tokenizer(text, add_special_tokens=False)["input_ids"]], device=device)
        found.append(hidden_states(ids)[0].float().mean(0).cpu())
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
    config, end = retrieval.config, int(bank.ends()[0])
    limit = torch.tensor([torch.iinfo(torch.long).max if before is None else before])
    candidates = cache(lambda: bank.embeddings_within(limit)[0])
    build = QueryBuilder(config.query_chunks, config.query_pooling, retrieval.retriever.as_query)
    request = Request(
        bank, config.retrieved, len(asking), limit, None,
        queries=lambda: torch.stack([build(embeddings, candidates) for embeddings in asking])[None],
        seeds=lambda group: [seed_of(config.seed, _mark(bank), end, group)],
        newest=config.newest_chunks,
    )  # fmt: skip
    scores, entries = retrieval.select(request)
    found = retrieval.gather(bank, entries, scores, count, torch.tensor([end if before is None else before]))
    if found is not None:
        found.asked = True
    return found


def _mark(bank: BankView) -> int:
    """A number of the text that was read, so that a random draw is another one for each."""
    return crc32(bank.row(0).tokens.numpy().tobytes())
