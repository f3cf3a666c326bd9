"""What a model does with texts of any length: read them into a bank, and write with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_memlong.bank.memory_bank import MemoryBank
from lightning_memlong.bank.room import SPARE
from lightning_memlong.config import MemoryConfig, require
from lightning_memlong.errors import UserError
from lightning_memlong.generation.prefill import Autocast, evaluating, read_windows, rest_of
from lightning_memlong.model.fingerprint import weights_digest
from lightning_memlong.progress import deferred_interrupt, token_bar
from lightning_memlong.retrieval.retrieval import Retrieval
from lightning_memlong.retrieval.retriever import Retriever, load_retriever
from lightning_memlong.text.tokenise import tokenise

if TYPE_CHECKING:
    from lightning_memlong.generation.conversation import Conversation, Prompt
    from lightning_memlong.model.model import MemLong

WINDOW = 2048
"""Tokens read at once, and of the local context, unless asked otherwise or the backbone cannot."""


class LongText:
    """Reading and writing for :class:`MemLong`."""

    autocast: Autocast = nullcontext
    """Context in which the model computes while it reads and writes, such as a Lightning plugin's."""
    _retrieval: Retrieval | None = None
    _settings: tuple[MemoryConfig, Any] | None = None

    def use_memory(self, config: MemoryConfig, tokenizer: Any, retriever: Retriever | None = None) -> None:
        """Say how texts become tokens and how chunks are retrieved; the encoder is loaded when it is first needed.

        Args:
            config: The memory settings.
            tokenizer: The backbone's.
            retriever: The encoder they name, where it is loaded already.

        Raises:
            UserError: For a query that needs text which is not written yet.
        """
        allowed = "previous: text that is being written cannot be asked with"
        require(config.query != "current", "memory.query", config.query, allowed, "leave it out")
        require(config.enabled, "memory.enabled", False, "true: what is read goes there", "set it to true")
        self._settings = config, tokenizer
        self._retrieval = None if retriever is None else Retrieval(config, retriever, tokenizer)

    @property
    def retrieval(self) -> Retrieval:
        """The memory settings at work.

        Raises:
            UserError: If nobody has said what they are.
        """
        if self._retrieval is None:
            if self._settings is None:
                raise UserError(
                    "memory: this model does not know its tokenizer and memory settings. Allowed: a model made by "
                    "MemLong.from_pretrained. Fix: use that, or call model.use_memory(MemoryConfig(), tokenizer)."
                )
            config, tokenizer = self._settings
            self._retrieval = Retrieval(
                config, load_retriever(config.retriever, self._model.config.hidden_size), tokenizer
            )
        return self._retrieval

    @property
    def _model(self) -> MemLong:
        return self  # type: ignore[return-value]

    def made_with(self) -> dict[str, str]:
        """What a bank belongs to that this model reads into."""
        model, config = self._model, self.retrieval.config
        retriever = f"{config.retriever.name} {config.retriever.prompt}".strip()
        return {
            "weights": weights_digest(model),
            "source": f"{model.source} of layers {model.stored_layers}",
            "retriever": retriever,
            "chunk_size": str(config.chunk_size),
        }

    def window(self, wanted: int | None = None) -> int:
        """Tokens of a window [tokens].

        Args:
            wanted: None: 2,048, or as many whole chunks as the backbone has positions for.

        Raises:
            UserError: If it is not a whole number of chunks, at least two, for which the backbone has positions.
        """
        chunk = self.retrieval.config.chunk_size
        # A first token stands before it.
        most = (int(getattr(self._model.config, "max_position_embeddings", None) or 2**31) - 1) // chunk * chunk
        if wanted is None:
            wanted = max(2 * chunk, min(WINDOW // chunk * chunk, most))
        ok = 2 * chunk <= wanted <= most and wanted % chunk == 0
        allowed = f"a multiple of memory.chunk_size={chunk} from two chunks to the backbone's {most} positions"
        require(ok, "window", wanted, allowed, f"use {min(most, max(2, round(wanted / chunk)) * chunk)}")
        return wanted

    # ---- reading ------------------------------------------------------------------------------------------

    def read(
        self,
        text: str | Sequence[str],
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
            text: A text; or several, each read into a row of its own, side by side.
            memory: A bank to go on with: if what it holds is the beginning of the text, the rest is read (and its last
                chunk again, if the text goes on in mid-token); else the text is read after what it holds. None: a new
                one.
            window: Tokens read at once [tokens]; None: see :meth:`window`.
            capacity: Size of a new bank's row [tokens], which then evicts by ``memory.policy``, and whose windows
                retrieve as in training so that it knows what is used. None: all that is read is kept.
            progress: Show a bar.

        Raises:
            UserError: For an empty text, a bank of another model, retriever, chunk size or number of rows, or one that
                finds no room; the bank is then as it was.
        """
        texts = [text] if isinstance(text, str) else list(text)
        tokens = [self.tokenise(t, row) for row, t in enumerate(texts)]
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
        window, model = self.window(window), self._model
        ok, allowed = capacity is None or capacity >= window, f"null, or at least the window ({window} tokens)"
        require(ok, "capacity", capacity, allowed, "raise it, or lower the window")
        bank = self._new_bank(len(tokens), tokens, capacity) if memory is None else memory
        self.check(bank, len(tokens))
        allowed = f"null, or {bank.capacity}: the bank is there already"
        require(capacity in (None, bank.capacity), "capacity", capacity, allowed, "leave it out, or begin a new bank")
        for row in range(bank.rows):
            bank.require_free(row)
        stretches = [rest_of(bank, row, t) for row, t in enumerate(tokens)]
        if not any(len(s.tokens) > s.known for s in stretches):
            return bank
        keeps = bank.keeps_everything
        for row, stretch in enumerate(stretches if keeps else ()):
            bank.make_room(row, -(-(len(stretch.tokens) - stretch.known) // bank.chunk_size))
        total = sum(len(s.tokens) - s.known for s in stretches)
        done = 0
        with evaluating(model), token_bar(progress) as bar, deferred_interrupt() as interrupted:
            bar.begin(total, "reading")
            for count in read_windows(model, self.retrieval, bank, stretches, window, self.autocast, not keeps):
                done += count
                bar.advance(count)
                if interrupted():
                    break
        if done < total:
            print(
                f"Interrupted: {done:,} of {total:,} tokens were read and are kept. The same call goes on from there, "
                "with what this one returns as memory=."
            )
        return bank

    def tokenise(self, text: str, row: int = 0) -> np.ndarray:
        """Tokens (T,) of a text that is to be read into a row, whole and without special ones.

        Raises:
            UserError: If it is empty.
        """
        found = f"text {row + 1} of several" if row else "text"
        require(isinstance(text, str) and bool(text.strip()), found, text[:20], "some text", "give a document to read")
        return tokenise(self.retrieval.tokenizer, [text])[0]

    def _new_bank(self, rows: int, tokens: Sequence[np.ndarray], capacity: int | None) -> MemoryBank:
        if capacity is None:
            spare = SPARE * self.retrieval.config.chunk_size  # for what will be said about it
            bank = self.retrieval.new_bank(rows, max(map(len, tokens)) + spare)
        else:
            bank = self.retrieval.new_bank(rows, capacity=capacity)
        bank.made_with = self.made_with()
        return bank

    def check(self, memory: MemoryBank, rows: int | None = None) -> None:
        """Check that a bank belongs to this model and its memory settings.

        Args:
            memory: The bank.
            rows: How many rows it must have; None: any.

        Raises:
            UserError: If it was made with something else.
        """
        memory.require_made_with(self.made_with())
        chunk = self.retrieval.config.chunk_size
        fix = "use a bank this model has read into, or set memory.chunk_size to the bank's"
        require(memory.chunk_size == chunk, "memory.chunk_size", chunk, f"{memory.chunk_size}, the bank's", fix)
        allowed = f"as many texts as the bank has rows, {memory.rows}"
        require(rows is None or rows == memory.rows, "text", f"{rows} texts", allowed, "give as many, or a new bank")

    # ---- writing ------------------------------------------------------------------------------------------

    def converse(self, memory: MemoryBank | None = None, *, row: int = 0, window: int | None = None) -> Conversation:
        """A conversation of several turns about what was read, see :class:`Conversation`.

        Args:
            memory: A bank this model has read into; None: an empty one.
            row: Which of its rows.
            window: Tokens of the local context [tokens]; None: see :meth:`window`.

        Raises:
            UserError: If the bank was made with something else.
        """
        from lightning_memlong.generation.conversation import Conversation

        return Conversation(self._model, memory, row, window)

    def generate(
        self,
        prompt: Prompt,
        memory: MemoryBank | None = None,
        *,
        query: str | None = None,
        row: int = 0,
        window: int | None = None,
        **options: Any,
    ) -> Any:
        """Go on with a prompt, with what was read in memory.

        Text that no longer fits the local context moves into the bank while this lasts; afterwards the bank holds what
        it held before, with counters that have counted.

        Args:
            prompt: Text to go on with; or messages (``[{"role": "user", "content": "..."}]``) for the backbone's chat
                template.
            memory: A bank this model has read into; None: nothing was read.
            query: Text that retrieves for the prompt; None: the prompt, or its last message.
            row: Which row of the bank.
            window: Tokens of the local context [tokens]; None: see :meth:`window`.
            **options: Those of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``,
                ``top_p``, ``num_beams``, ``streamer``, ``stop_strings`` and so on.

        Returns:
            The text that was written, without the prompt; a list of them with ``num_return_sequences``; what
            transformers returns with ``return_dict_in_generate``.

        Raises:
            UserError: For an empty prompt, one that does not fit the window, or a bank made with something else.
        """
        with self.converse(memory, row=row, window=window) as conversation:
            return conversation.say(prompt, query=query, **options)
