"""A model that reads texts of any length into a bank, and what writing with it needs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor

from lightning_memlong.bank import SPARE, MemoryBank
from lightning_memlong.config import MemoryConfig, require, require_whole
from lightning_memlong.distributed import note
from lightning_memlong.generation.prefill import evaluating, read_windows, remaining
from lightning_memlong.model import MemLongModel, weights_digest
from lightning_memlong.progress import deferred_interrupt, token_bar
from lightning_memlong.retrieval import Retrieval, Retriever, embed_texts, load_retriever
from lightning_memlong.text import Text, as_tokens, tokenise

WINDOW = 2048
"""Tokens read at once, and of the local context, unless asked otherwise or the backbone cannot."""


class LongContext:
    """A model with its tokenizer and memory settings.

    Args:
        model: Reads and writes.
        config: The memory settings.
        tokenizer: The backbone's.
        retriever: The encoder they name, where it is loaded already; None: it is loaded when it is first needed.
        autocast: Context in which the model computes, such as a Lightning plugin's.

    Raises:
        UserError: For a query that needs text which is not written yet.
    """

    def __init__(
        self,
        model: MemLongModel,
        config: MemoryConfig,
        tokenizer: Any,
        retriever: Retriever | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        allowed = "previous: text that is being written cannot be asked with"
        require(config.query != "current", "memory.query", config.query, allowed, "leave it out")
        require(config.enabled, "memory.enabled", False, "true: what is read goes there", "set it to true")
        self.model, self.config, self.tokenizer, self.autocast = model, config, tokenizer, autocast
        self._retriever = retriever
        self._retrieval: Retrieval | None = None

    @property
    def retrieval(self) -> Retrieval:
        """The memory settings at work; the encoder is loaded at first use."""
        if self._retrieval is None:
            hidden_size = self.model.config.hidden_size
            retriever = self._retriever or load_retriever(self.config.retriever, hidden_size)
            self._retrieval = Retrieval(self.config, retriever, self.tokenizer)
        return self._retrieval

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, E) of texts that ask."""
        return embed_texts(self.retrieval, texts, self.model.device, self.hidden_states)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """The memory layer's hidden states (1, T, E) of tokens (1, T)."""
        with self.autocast():
            return self.model.capture(ids, hidden=True)["hidden"]

    def provenance(self) -> dict[str, str]:
        """What a bank belongs to that this model reads into."""
        model, config = self.model, self.config
        return {
            "weights": weights_digest(model),
            "source": f"{model.layout.source} of layers {model.stored_layers}",
            "retriever": config.retriever.identity,
            "chunk_size": str(config.chunk_size),
        }

    def window(self, wanted: int | None = None) -> int:
        """Tokens of a window [tokens].

        Args:
            wanted: None: 2,048, or as many whole chunks as the backbone has positions for.

        Raises:
            UserError: If it is not a whole number of chunks, at least two, for which the backbone has positions.
        """
        chunk = self.config.chunk_size
        # A first token stands before it.
        most = (int(getattr(self.model.config, "max_position_embeddings", None) or 2**31) - 1) // chunk * chunk
        if wanted is not None:
            require_whole("window", wanted)
        else:
            wanted = max(2 * chunk, min(WINDOW // chunk * chunk, most))
        ok = 2 * chunk <= wanted <= most and wanted % chunk == 0
        allowed = f"a multiple of memory.chunk_size={chunk} from two chunks to the backbone's {most} positions"
        fix = f"use {min(most, max(2, round(wanted / chunk)) * chunk)}" if most >= 2 * chunk else "use smaller chunks"
        require(ok, "window", wanted, allowed, fix)
        return wanted

    # ---- reading ------------------------------------------------------------------------------------------

    def read(
        self,
        text: Text,
        memory: MemoryBank | None = None,
        *,
        window: int | None = None,
        capacity: int | None = None,
        progress: bool = True,
    ) -> MemoryBank:
        """Read texts of any length into a bank, window by window, without gradients.

        Ctrl-C ends it after the window it is in: the bank then holds what has been read, and the same call with
        ``memory=`` that bank goes on from there.

        Args:
            text: A text, or its token ids (list, (T,) tensor or array, or what a tokenizer gives); or several, each
                read into a row of its own, side by side.
            memory: A bank to go on with: if what it holds is the beginning of the text, the rest is read (and its last
                chunk again, if the text goes on in mid-token); else the text is read after what it holds. None: a new
                one.
            window: Tokens read at once [tokens]; None: see :meth:`window`, and no more than a bank holds that evicts.
            capacity: Size of a new bank's row [tokens], which then evicts by ``memory.policy``, and whose windows
                retrieve as in training so that it knows what is used. None: all that is read is kept.
            progress: Show a bar.

        Raises:
            UserError: For an empty text, a bank of another model, retriever, chunk size or number of rows, or one that
                finds no room; the bank is then as it was.
        """
        tokens = as_tokens(text, self.tokenise)
        return self.read_tokens(tokens, memory, window=window, capacity=capacity, progress=progress)

    def read_tokens(
        self,
        tokens: Sequence[np.ndarray],
        memory: MemoryBank | None = None,
        *,
        window: int | None = None,
        capacity: int | None = None,
        progress: bool = True,
    ) -> MemoryBank:
        """As :meth:`read`, for texts that are tokens (T,) already."""
        if memory is not None:
            self.check(memory, len(tokens))
            if window is None and not memory.keeps_everything:
                window = min(self.window(), memory.capacity)
        window, model = self.window(window), self.model
        self._require_capacity(capacity, window)
        self._require_known(tokens)
        bank = self._new_bank(len(tokens), tokens, capacity) if memory is None else memory
        ok, allowed = bank.keeps_everything or window <= bank.capacity, f"at most {bank.capacity}, the bank's capacity"
        require(ok, "window", window, allowed, "give a smaller one")
        allowed = f"null, or {bank.capacity}: the bank is there already"
        require(capacity in (None, bank.capacity), "capacity", capacity, allowed, "leave it out, or begin a new bank")
        for row in range(bank.rows):
            bank.row(row).require_unlocked()
        spans = [remaining(bank, row, t) for row, t in enumerate(tokens)]
        if not any(len(s.tokens) > s.known for s in spans):
            return bank
        keeps = bank.keeps_everything
        for row, span in enumerate(spans if keeps else ()):
            bank.reserve(row, -(-(len(span.tokens) - span.known) // bank.chunk_size))
        total = sum(len(s.tokens) - s.known for s in spans)
        done = 0
        with evaluating(model), token_bar(progress) as bar, deferred_interrupt() as interrupted:
            bar.begin(total, "reading")
            for count in read_windows(model, self.retrieval, bank, spans, window, self.autocast, not keeps):
                done += count
                bar.advance(count)
                if interrupted():
                    break
        if done < total:
            note(
                f"Interrupted: {done:,} of {total:,} tokens were read and are kept. The same call goes on from there, "
                "with what this one returns as memory=."
            )
        return bank

    def _require_capacity(self, capacity: int | None, window: int) -> None:
        if capacity is None:
            return
        require_whole("capacity", capacity)
        allowed = "null with memory.policy=none, which keeps everything"
        require(self.config.policy != "none", "capacity", capacity, allowed, "leave it out, or set another policy")
        allowed = f"null, or at least the window ({window} tokens)"
        require(capacity >= window, "capacity", capacity, allowed, "raise it, or lower the window")

    def _require_known(self, tokens: Sequence[np.ndarray]) -> None:
        embeddings: Any = self.model.backbone.get_input_embeddings()
        size, largest = embeddings.num_embeddings, max((int(t.max()) for t in tokens if len(t)), default=0)
        require(largest < size, "text", f"token {largest}", f"ids below {size}, the backbone's", "use its tokenizer")

    def tokenise(self, text: str, row: int = 0) -> np.ndarray:
        """Tokens (T,) of a text that is to be read into a row, whole and without special ones, however it is spelled.

        Raises:
            UserError: If it is empty.
        """
        found = f"text {row + 1} of several" if row else "text"
        require(isinstance(text, str) and bool(text.strip()), found, text[:20], "some text", "give a document to read")
        return tokenise(self.tokenizer, [text], control=False)[0]

    def _new_bank(self, rows: int, tokens: Sequence[np.ndarray], capacity: int | None) -> MemoryBank:
        if capacity is None:
            spare = SPARE * self.config.chunk_size  # for what will be said about it
            bank = self.retrieval.new_bank(rows, max(map(len, tokens)) + spare)
        else:
            bank = self.retrieval.new_bank(rows, capacity=capacity)
        bank.provenance = self.provenance()
        return bank

    def check(self, memory: MemoryBank, rows: int | None = None) -> None:
        """Check that a bank belongs to this model and its memory settings.

        Args:
            memory: The bank.
            rows: How many rows it must have; None: any.

        Raises:
            UserError: If it was made with something else.
        """
        ok, allowed = isinstance(memory, MemoryBank), "a bank that model.read gave, or MemoryBank.open(file)"
        require(ok, "memory", memory, allowed, "open the file first")
        memory.require_provenance(self.provenance())
        chunk = self.config.chunk_size
        fix = "use a bank this model has read into, or set memory.chunk_size to the bank's"
        require(memory.chunk_size == chunk, "memory.chunk_size", chunk, f"{memory.chunk_size}, the bank's", fix)
        allowed = f"as many texts as the bank has rows, {memory.rows}"
        require(rows is None or rows == memory.rows, "text", f"{rows} texts", allowed, "give as many, or a new bank")
