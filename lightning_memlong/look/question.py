"""A question while it is answered: one thread writes, another looks on."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from lightning_memlong.generation import Conversation, Prompt
from lightning_memlong.look.attended import Attended, attended
from lightning_memlong.look.book import pieces
from lightning_memlong.look.looker import Looker
from lightning_memlong.model import Watch, watching


@dataclass(frozen=True)
class Written(Attended):
    """What has been written of an answer; n is its length in tokens."""

    pieces: list[str]
    """(n,) what each token says; empty for special ones."""

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.pieces)


class _Tokens(BaseStreamer):
    """Keeps what is written, token by token."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt, then each token."""
        if not self._prompt:
            self.ids += value.flatten().tolist()
        self._prompt = False

    def end(self) -> None:
        """Nothing is held back."""


class Question:
    """A question about the book, answered once, by itself.

    Args:
        looker: Who has read the book.
        prompt: What is asked.
        window: Tokens of the local context [tokens]; None: as the model says.
        options: Of transformers' ``generate``.
    """

    def __init__(self, looker: Looker, prompt: Prompt, window: int | None, options: dict[str, Any]) -> None:
        self._looker, self._prompt, self._window, self._options = looker, prompt, window, options
        self._tokens, self._watch, self._stop = _Tokens(), Watch(1), threading.Event()

    def answer(self) -> Written:
        """Write the answer.

        Raises:
            UserError: For a prompt or options that cannot be used.
        """
        looker = self._looker

        def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(ids),), self._stop.is_set(), device=ids.device)

        options = {**self._options, "stopping_criteria": [stop], "streamer": self._tokens}
        with looker.lock, watching(looker.model, 1) as self._watch:
            with Conversation(looker.model.long_context, looker.memory, window=self._window) as conversation:
                conversation.say(self._prompt, **options)
                return self.so_far()

    def stop(self) -> None:
        """Let it end after the token it is at."""
        self._stop.set()

    def so_far(self) -> Written:
        """What is there now, from whatever thread."""
        ids = list(self._tokens.ids)
        tokenizer = self._looker.model.retrieval.tokenizer
        found = attended(list(self._watch.sets), len(ids), self._looker.memory.view(0), tokenizer)
        special = {*tokenizer.all_special_ids}
        shown = pieces(tokenizer, [i for i in ids if i not in special])
        texts = iter(shown)
        said = ["" if i in special else next(texts) for i in ids]
        return Written(found.chunks, found.layers, found.attention, said)
