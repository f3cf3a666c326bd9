"""What a window retrieves, and how it is stored: the memory settings at work on a bank.

Legend: R rows, G searches of a row (1, or one a chunk), n chunks of a window, k chunks retrieved, E embedding size.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank import BankView, MemoryBank, Retrieved
from lightning_memlong.config import MemoryConfig
from lightning_memlong.retrieval.queries import Asking, Known, chunk_queries, search, window_queries
from lightning_memlong.retrieval.retriever import HiddenRetriever, Retriever

Profile = Callable[[str], AbstractContextManager[Any]]


class Retrieval:
    """Embeds, searches, gathers and stores (paper, section 2), for batches as :mod:`datamodules.documents` makes them.

    Args:
        config: The memory settings.
        retriever: The frozen encoder.
        tokenizer: Turns chunks back into text for it.
        profile: Measures ``memory.retriever``, ``memory.search``, ``memory.gather`` and ``memory.insert``.
    """

    def __init__(
        self, config: MemoryConfig, retriever: Retriever, tokenizer: Any, profile: Profile = nullcontext
    ) -> None:
        self.config, self.retriever, self.tokenizer, self._profile = config, retriever, tokenizer, profile
        self._window_embeddings: Tensor | None = None

    def open_bank(self, path: str | Path, device: torch.device, provenance: Mapping[str, str]) -> MemoryBank:
        """A bank from a file, with these settings' storage, index and policy.

        Args:
            path: The file.
            device: Where keys and values go.
            provenance: What it must belong to.

        Raises:
            UserError: See :meth:`MemoryBank.open`.
        """
        c = self.config
        return MemoryBank.open(path, device, provenance, policy=c.policy, policy_args=c.policy_args, **self._kept())

    def _kept(self) -> dict[str, Any]:
        """How a bank keeps what it holds, whatever its size and policy."""
        c = self.config
        dtype = None if c.dtype == "auto" else getattr(torch, c.dtype)
        facts = {"index": c.index, "dtype": dtype, "half_life": c.half_life}
        return {**facts, "storage": c.storage, "storage_folder": c.storage_folder}

    def new_bank(self, rows: int, everything: int | None = None, capacity: int | None = None) -> MemoryBank:
        """An empty bank as the settings say; or one that holds ``everything`` [tokens] and evicts nothing.

        ``capacity`` [tokens] wins over that of the settings.
        """
        c = self.config
        capacity, policy, arguments = capacity or c.capacity, c.policy, c.policy_args
        if everything is not None:
            slots = max(2, -(-everything // c.chunk_size), c.top_k)
            capacity, policy, arguments = slots * c.chunk_size, "none", {}
        return MemoryBank(rows, capacity, c.chunk_size, policy, arguments, **self._kept())

    # ---- before a window is read --------------------------------------------------------------------------

    def retrieve(self, bank: BankView, batch: dict[str, Any], count: bool = True) -> Retrieved | None:
        """What the bank gives for a window; None: nothing yet. Unless ``count`` is false, the counters go up.

        Only chunks that end where the window begins, or before, are looked at; with ``batch["memory_start"]`` (R,),
        those that begin there or after it.
        """
        # Streams of one's own need not say these where windows are disjoint and in order.
        batch.setdefault("offset", bank.ends())
        batch.setdefault("overlap", torch.zeros_like(batch["offset"]))
        self.prepare(batch)
        if bank.insertions == 0:
            return None
        with self._profile("memory.search"):
            scores, entries = self.choose(bank, batch)
        with self._profile("memory.gather"):
            return bank.gather(entries, scores, count)

    def choose(self, bank: BankView, batch: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Scores (R, G, k), None for the controls, and places (R, G, k) of what a window retrieves."""
        before, top_k = batch["offset"].cpu(), self.config.top_k
        after = batch["memory_start"].cpu() if "memory_start" in batch else None
        chunks = batch["input_ids"].shape[1] // self.config.chunk_size if self.config.granularity == "chunk" else 1
        if self.config.selection == "recent":
            return None, bank.recent(top_k, before, after)[:, None].expand(-1, chunks, -1)
        if self.config.selection == "random":
            places = list(zip(batch["document_id"].tolist(), before.tolist(), strict=True))
            drawn = [
                bank.random(top_k, [seed_of(self.config.seed, *p, c) for p in places], before, after)
                for c in range(chunks)
            ]
            return None, torch.stack(drawn, dim=1)
        # What is rare among chunks (BM25) is counted over those that can be found, not over text yet to come.
        within = cache(lambda: bank.embeddings_within(before, after))
        known: list[Known] = [partial(lambda row: within()[row], row) for row in range(bank.rows)]
        queries = self._queries(bank, batch, known)
        return search(bank, queries, top_k, before, after)

    def prepare(self, batch: dict[str, Any]) -> None:
        """Embed the window's chunks where queries need them; the rest are embedded when chunks are stored."""
        self._window_embeddings = None
        if self.config.query == "current":
            self._window_embeddings = self.embed(batch)
        elif self.config.granularity == "chunk" and self.config.selection == "similarity":
            self._window_embeddings = self.embed(batch, self._new_lengths(batch) > 0)

    def _queries(self, bank: BankView, batch: dict[str, Any], known: list[Known]) -> Tensor:
        """(R, G, Q, E): of one search a row, or one a chunk."""
        own, by_chunk, as_query = self._window_embeddings, self.config.granularity == "chunk", self.retriever.as_query
        offset, overlap = batch["offset"].cpu(), batch["overlap"].cpu()
        if self.config.query == "current":
            assert own is not None
            asked = torch.stack([as_query(o, k) for o, k in zip(own, known, strict=True)])
            return F.normalize(asked if by_chunk else asked.mean(dim=1, keepdim=True), dim=2)[:, :, None]
        asking = Asking(self.config.query_chunks, self.config.query_pooling, as_query)
        if by_chunk:
            assert own is not None
            return chunk_queries(bank, own, offset, overlap, asking, known)
        return window_queries(bank, offset + overlap, asking, known)

    # ---- after it was read --------------------------------------------------------------------------------

    def store(
        self, bank: BankView, outputs: Mapping[str, Any], batch: dict[str, Any], embeddings: Tensor | None = None
    ) -> None:
        """Insert the chunks of the window that are new, with their embeddings; the bank evicts when full.

        Args:
            bank: Where to.
            outputs: ``keys`` and ``values`` of the window, and ``hidden`` states of the memory layer (R, T, hidden
                size) for retriever ``hidden``.
            batch: The window, as :meth:`retrieve` had it.
            embeddings: (R, n, E), where they are there already.
        """
        lengths = self._new_lengths(batch)
        if embeddings is None:
            embeddings = self._window_embeddings
        if embeddings is None:
            embeddings = self.embed(batch, lengths > 0, outputs.get("hidden"))
        positions = batch["offset"].cpu()[:, None] + self._chunks(batch)[0]
        with self._profile("memory.insert"):
            bank.insert(outputs["keys"], outputs["values"], embeddings, lengths, positions)

    def _new_lengths(self, batch: dict[str, Any]) -> Tensor:
        """Real tokens (R, n) of the window's chunks; 0 for those that were stored with an earlier window."""
        starts, lengths = self._chunks(batch)
        lengths[starts.expand_as(lengths) < batch["overlap"].cpu()[:, None]] = 0
        return lengths

    def _chunks(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Where the window's chunks begin (n,), and how many real tokens each has (R, n)."""
        starts = torch.arange(0, batch["input_ids"].shape[1], self.config.chunk_size)
        return starts, (batch["length"].cpu()[:, None] - starts).clamp(0, self.config.chunk_size)

    def embed(self, batch: dict[str, Any], wanted: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Embeddings (R, n, E) of the window's chunks; zeros where not ``wanted`` (R, n).

        Args:
            batch: The window.
            wanted: Which chunks; None: all that have tokens.
            hidden: (R, T, hidden size) states of the memory layer, for retriever ``hidden``.
        """
        size = self.config.chunk_size
        if isinstance(self.retriever, HiddenRetriever):
            assert hidden is not None
            return pooled(hidden, self._chunks(batch)[1], size)
        rows, tokens = batch["input_ids"].shape
        chunks = batch["input_ids"].cpu().reshape(rows * tokens // size, size)
        lengths = self._chunks(batch)[1].flatten()
        which = (lengths > 0) if wanted is None else wanted.flatten()
        embeddings = torch.zeros(len(chunks), self.retriever.size)
        if bool(which.any()):
            texts = self.tokenizer.batch_decode(
                [chunks[i, : lengths[i]] for i in which.nonzero().flatten()], clean_up_tokenization_spaces=False
            )
            self.retriever.to(batch["input_ids"].device)
            with self._profile("memory.retriever"):
                embeddings[which] = self.retriever.encode(texts)
        return embeddings.view(rows, tokens // size, -1)


def pooled(hidden: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Mean hidden states (R, n, E) over the real tokens of each chunk, of length one; zeros for empty chunks."""
    chunks = hidden.detach().float().cpu().unflatten(1, (-1, size))
    real = torch.arange(size) < lengths[:, :, None]
    return F.normalize((chunks * real[..., None]).sum(dim=2), dim=2)


def seed_of(*parts: int) -> int:
    """One seed for a place in the data, so that a resumed run draws what an unbroken one would."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed
