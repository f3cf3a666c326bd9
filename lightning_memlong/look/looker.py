"""What a sentence of a book retrieved, how it was read, and what it was worth: computed when somebody asks."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memlong.bank import MemoryBank, Retrieved
from lightning_memlong.config import require
from lightning_memlong.look.attended import Attended, attended
from lightning_memlong.look.book import LONGEST, Book
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import watching
from lightning_memlong.retrieval import retrieve_for

CONTEXT = 256
"""Tokens of the local text a sentence is read in, itself included."""


@dataclass(frozen=True)
class Sight(Attended):
    """A sentence beside its memory; n is its length in tokens."""

    start: int
    """Its first token [tokens]."""
    pieces: list[str]
    """(n,) what each token says."""
    on: Tensor
    """(n,) loss of each token with memory [nats]; 0 for the first of the book, which nothing predicts."""
    off: Tensor
    """(n,) the same without memory: same weights, same local text [nats]."""

    @property
    def gains(self) -> Tensor:
        """(n,) what memory is worth to each token: its loss without, less that with it [nats]."""
        return self.off - self.on


class Looker:
    """A model and a book that it has read into a bank.

    Args:
        model: Reads.
        memory: What it has read; the first row is looked at.
        context: Tokens of the local text a sentence is read in [tokens].

    Raises:
        UserError: If the bank was made with something else, or its text was not kept, or the context has no room.
    """

    def __init__(self, model: MemLong, memory: MemoryBank, context: int = CONTEXT) -> None:
        model.long_context.check(memory)
        self.model, self.memory = model, memory
        kept = memory.row(0).tokens
        allowed, fix = "one with its text, as predict --bank and chat --bank write it", "name the text: it is read anew"
        require(len(kept) > 0, "bank", "a bank without text", allowed, fix)
        most = int(getattr(model.config, "max_position_embeddings", None) or 2**31) - 1
        allowed = f"from {2 * LONGEST} tokens, twice the longest sentence, to the backbone's {most}"
        require(2 * LONGEST <= context <= most, "context", context, allowed, f"use {min(CONTEXT, most)}")
        self.context = context
        self.book = Book(kept.tolist(), model.retrieval.tokenizer)
        self.lock = threading.Lock()
        """Held by who computes: one at a time, whoever asks."""

    def retrieve(self, start: int, begin: int) -> Retrieved | None:
        """What the tokens from ``start`` on retrieve; None: nothing.

        As in training: the chunks before them ask, and what ends before the local text is looked at.

        Args:
            start: The first token that is predicted [tokens].
            begin: Where the local text begins [tokens].
        """
        bank, retrieval = self.memory.view(0), self.model.retrieval
        asking = bank.last_embeddings(retrieval.config.query_chunks, torch.tensor([start]))
        return retrieve_for(retrieval, bank, asking, before=begin)

    @torch.no_grad()
    def look(self, start: int, end: int) -> Sight:
        """Read a sentence with memory and without.

        Args:
            start: Its first token [tokens].
            end: The place after its last one [tokens].

        Raises:
            UserError: If there is no such sentence, or it is as long as the local text.
        """
        most = self.context // 2
        ok = 0 <= start < end <= len(self.book) and end - start <= most
        allowed = f"up to {most} tokens of the book's {len(self.book)}"
        require(ok, "sentence", f"tokens {start} to {end}", allowed, "choose a shorter one, or raise context")
        begin = max(0, end - self.context)
        tokens = end - start
        with self.lock:
            ids = torch.tensor([self.book.ids(begin, end)], device=self.model.device)
            memory = self.retrieve(start, begin)
            with watching(self.model, tokens + 1) as watch:  # a token is predicted by the one before it
                on = self._losses(ids, memory, tokens)
            off = on if memory is None else self._losses(ids, None, tokens)
            found = attended(watch.sets, tokens, self.memory.view(0), self.model.retrieval.tokenizer)
        pieces = self.book.pieces(start, end)
        return Sight(found.chunks, found.layers, found.attention, start, pieces, on, off)

    def _losses(self, ids: Tensor, memory: Retrieved | None, tokens: int) -> Tensor:
        """Losses (n,) of the last ``tokens`` of a text (1, T)."""
        with self.model.long_context.autocast():
            output = self.model(ids, memory=memory, logits_to_keep=tokens + 1)
            return output.token_losses(ids[:, -tokens - 1 :])[0, -tokens:].float().cpu()
