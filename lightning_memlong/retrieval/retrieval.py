"""What a window retrieves, and how it is stored: the memory settings at work on a bank.

Legend: R rows, G searches of a row (1, or one a chunk), n chunks of a window, k chunks retrieved, E embedding size.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.bank import BankView, Line, MemoryBank, Retrieved, Transfer
from lightning_memlong.config import MemoryConfig, require
from lightning_memlong.retrieval.chunks import Chunks
from lightning_memlong.retrieval.distractors import with_distractors
from lightning_memlong.retrieval.queries import Candidates, QueryBuilder, chunk_queries, window_queries
from lightning_memlong.retrieval.retriever import Retriever
from lightning_memlong.retrieval.selection import Request, load_selector, seed_of
from lightning_memlong.text import Batch

Profile = Callable[[str], AbstractContextManager[Any]]


class Retrieval:
    """Embeds, searches, gathers and stores (paper, section 2), for batches as :class:`WindowBatch` describes them.

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
        self.select = load_selector(config.selection)
        self._line, self._beside = Line(), Transfer(torch.device("cpu"), "encoder")

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

    def retrieve(self, bank: BankView, batch: Batch, count: bool = True, distractors: int = 0) -> Retrieved | None:
        """What the bank gives for a window; None: nothing yet. Unless ``count`` is false, the counters go up.

        With ``memory.use`` attention they go up by :meth:`count_use`, once the window was read.

        Only chunks that end where the window begins, or before, are looked at; with ``batch["memory_start"]`` (R,),
        those that begin there or after it. ``distractors``: as many other rows give theirs too.
        """
        batch.pop("embeddings", None)
        if bank.insertions == 0:
            return None
        request = self._request(bank, batch)
        with self._profile("memory.search"):
            scores, entries = self.select(request)
        with self._profile("memory.gather"):
            found = bank.gather(entries, scores, count and not self._by_attention)
            if distractors:
                found = with_distractors(self.select, request, found, batch["document_id"], distractors)
        return self._completed(found, count, batch["length"], batch["offset"])

    def gather(
        self,
        bank: BankView,
        entries: Tensor,
        scores: Tensor | None = None,
        count: bool = True,
        begin: Tensor | None = None,
    ) -> Retrieved | None:
        """As :meth:`BankView.gather`; the record says how many of its chunks each token reads.

        It counts as :meth:`retrieve` does. ``begin`` (R,) or (1,): where what reads it begins in the document.
        """
        found = bank.gather(entries, scores, count and not self._by_attention)
        return self._completed(found, count, begin=begin)

    @property
    def _by_attention(self) -> bool:
        return self.config.use == "attention"

    def _completed(
        self, found: Retrieved | None, count: bool, length: Tensor | None = None, begin: Tensor | None = None
    ) -> Retrieved | None:
        if found is not None:
            found.length = length
            found.begin = None if begin is None else begin.repeat_interleave(len(found.mask) // len(begin))
            found.count_attention = count and self._by_attention
            if self.config.candidates is not None:
                found.top_k = self.config.top_k
        return found

    def embed_ahead(self, batch: Batch) -> None:
        """Begin to embed the window's new chunks while the model reads it, for :meth:`store`, after :meth:`retrieve`.

        Only on a GPU: the CPU has no other stream to do it in. What embeds hidden states has to wait for them.
        """
        device = batch["input_ids"].device
        if device.type != "cuda" or self.retriever.needs_hidden or "embeddings" in batch:
            return
        if self._beside.device != device:
            self._beside = Transfer(device, "encoder")
        self.retriever.to(device)
        self._beside.follow()  # the encoder's weights are there
        tokens = self._tokens(batch).cpu()
        batch["embeddings"] = self._line.ask(self._embed_beside, tokens, batch["length"], self._new_lengths(batch) > 0)

    def _embed_beside(self, tokens: Tensor, length: Tensor, wanted: Tensor) -> Tensor:
        with self._beside.queue():
            return self._embeddings(tokens, length, wanted, None, self._beside.device)

    def settle(self) -> None:
        """Wait for what is embedded beside: the encoder is for one thread at a time."""
        self._line.settle()

    def choose(self, bank: BankView, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Scores (R, G, k), None for the controls, and entries (R, G, k) of what a window retrieves.

        Where queries need the window's own embeddings they are left in ``batch["embeddings"]``, so that
        :meth:`store` need not make them again.
        """
        batch.pop("embeddings", None)
        return self.select(self._request(bank, batch))

    def _request(self, bank: BankView, batch: Batch) -> Request:
        """What a window asks; its queries are made once, whoever asks for them again."""
        config, before = self.config, batch["offset"]
        groups = batch["input_ids"].shape[1] // config.chunk_size if config.granularity == "chunk" else 1
        places = list(zip(batch["document_id"].tolist(), before.tolist(), strict=True))
        return Request(
            bank, config.retrieved, groups, before, batch.get("memory_start"),
            queries=cache(lambda: self._queries(bank, batch)),
            seeds=lambda group: [seed_of(config.seed, *place, group) for place in places],
            newest=config.newest_chunks,
        )  # fmt: skip

    def _queries(self, bank: BankView, batch: Batch) -> Tensor:
        """(R, G, Q, E): of one search a row, or one a chunk."""
        config, as_query, by_chunk = self.config, self.retriever.as_query, self.config.granularity == "chunk"
        before, overlap = batch["offset"], batch["overlap"]
        # What is rare among chunks (BM25) is counted over those that can be found, not over text yet to come.
        within = cache(lambda: bank.embeddings_within(before, batch.get("memory_start")))
        candidates: list[Candidates] = [partial(lambda row: within()[row], row) for row in range(bank.rows)]
        if config.query == "current":
            own = batch["embeddings"] = self.embed(batch)
            asked = torch.stack([as_query(o, c) for o, c in zip(own, candidates, strict=True)])
            return F.normalize(asked if by_chunk else asked.mean(dim=1, keepdim=True), dim=2)[:, :, None]
        build = QueryBuilder(config.query_chunks, config.query_pooling, as_query)
        if by_chunk:
            own = batch["embeddings"] = self.embed(batch, self._new_lengths(batch) > 0)
            return chunk_queries(bank, own, before, overlap, build, candidates)
        return window_queries(bank, before + overlap, build, candidates)

    # ---- after it was read --------------------------------------------------------------------------------

    def count_use(self, bank: BankView, memory: Retrieved | None, use: Tensor | None) -> None:
        """Let the counters of what was retrieved go up, where that waits for the attention it gets; before storing.

        Args:
            bank: Where it is from.
            memory: What :meth:`retrieve` gave.
            use: (R, k) share of attention that each chunk got, as the model tells it.

        Raises:
            UserError: If nobody told it.
        """
        if memory is None or memory.empty or not memory.count_attention:
            return
        allowed = "retrieved, where the step's output lacks chunk_use (MemLongOutput.chunk_use)"
        require(use is not None, "memory.use", self.config.use, allowed, "give it out, or set --memory.use retrieved")
        assert use is not None
        bank.count_use(memory.entries, use, memory.scores)

    def store(self, bank: BankView, outputs: Mapping[str, Any], batch: Batch, embeddings: Tensor | None = None) -> None:
        """Insert the chunks of the window that are new, with their embeddings; the bank evicts when full.

        Args:
            bank: Where to.
            outputs: ``keys`` and ``values`` of the window, and ``hidden`` states of the memory layer (R, T, hidden
                size) for an encoder that needs them.
            batch: The window, as :meth:`retrieve` had it.
            embeddings: (R, n, E), where they are there already; None: those in the batch, or made now.
        """
        lengths = self._new_lengths(batch)
        if embeddings is None:
            embeddings = batch.get("embeddings")
        if isinstance(embeddings, Future):
            with self._profile("memory.retriever"):
                embeddings = batch["embeddings"] = embeddings.result()
        if embeddings is None:
            embeddings = self.embed(batch, lengths > 0, outputs.get("hidden"))
        positions = batch["offset"][:, None] + self._chunk_starts(batch["input_ids"])
        with self._profile("memory.insert"):
            bank.insert(outputs["keys"], outputs["values"], embeddings, lengths, positions)

    def _new_lengths(self, batch: Batch) -> Tensor:
        """Real tokens (R, n) of the window's chunks; 0 for those that were stored with an earlier window."""
        starts, lengths = self._chunk_starts(batch["input_ids"]), self._lengths(batch["input_ids"], batch["length"])
        lengths[starts.expand_as(lengths) < batch["overlap"][:, None]] = 0
        return lengths

    def _chunk_starts(self, ids: Tensor) -> Tensor:
        """Where the chunks (n,) of windows (R, T) begin."""
        return torch.arange(0, ids.shape[1], self.config.chunk_size)

    def _lengths(self, ids: Tensor, length: Tensor) -> Tensor:
        """How many real tokens each chunk (R, n) of windows (R, T) has that hold ``length`` (R,) of them."""
        return (length[:, None] - self._chunk_starts(ids)).clamp(0, self.config.chunk_size)

    def embed(self, batch: Batch, wanted: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Embeddings (R, n, E) of the window's chunks; see :meth:`embed_tokens`."""
        return self.embed_tokens(self._tokens(batch), batch["length"], wanted, hidden, batch["input_ids"].device)

    @staticmethod
    def _tokens(batch: Batch) -> Tensor:
        """A window's tokens (R, T), on the host if they are there, too."""
        tokens: Tensor = batch["input_ids"] if batch.get("tokens") is None else batch["tokens"]
        return tokens

    def embed_tokens(
        self,
        ids: Tensor,
        length: Tensor | None = None,
        wanted: Tensor | None = None,
        hidden: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Embeddings (R, n, E) of chunks, float32, on the CPU; zeros where not ``wanted``.

        Args:
            ids: (R, T) tokens, whole chunks.
            length: (R,) real tokens; None: all.
            wanted: (R, n) which chunks; None: all that have tokens.
            hidden: (R, T, hidden size) states of the memory layer, for an encoder that needs them.
            device: Where the encoder works; None: where the tokens are.
        """
        self.settle()
        length = torch.full((len(ids),), ids.shape[1]) if length is None else length
        with self._profile("memory.retriever"):
            return self._embeddings(ids, length, wanted, hidden, ids.device if device is None else device)

    def _embeddings(
        self, ids: Tensor, length: Tensor, wanted: Tensor | None, hidden: Tensor | None, device: torch.device
    ) -> Tensor:
        size, (rows, tokens) = self.config.chunk_size, ids.shape
        lengths = self._lengths(ids, length).flatten()
        which = (lengths > 0) if wanted is None else wanted.flatten()
        # A precision plugin changes the default type in all threads, while a step is made.
        embeddings = torch.zeros(len(lengths), self.retriever.size, dtype=torch.float32)
        if bool(which.any()):
            states = None
            if hidden is not None and self.retriever.needs_hidden:
                states = hidden.detach().float().cpu().reshape(len(lengths), size, -1)[which]
            chunks = Chunks(ids.cpu().reshape(-1, size)[which], lengths[which], self._decode, states)
            self.retriever.to(device)
            embeddings[which] = self.retriever.embed(chunks).float()
        return embeddings.view(rows, tokens // size, -1)

    def _decode(self, chunks: Sequence[Tensor]) -> list[str]:
        return self.tokenizer.batch_decode(list(chunks), clean_up_tokenization_spaces=False)
