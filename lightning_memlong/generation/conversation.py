"""Turns of a conversation about what was read: prompts in, text out, with the passages that were retrieved."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import require, require_whole
from lightning_memlong.errors import UserError
from lightning_memlong.generation.hf_generate import GenerateAdapter, loop_options, refused, rehearse
from lightning_memlong.generation.local_context import LocalContext
from lightning_memlong.generation.long_context import LongContext
from lightning_memlong.generation.prefill import evaluating
from lightning_memlong.progress import deferred_interrupt
from lightning_memlong.text import tokenise

Prompt = str | Sequence[Mapping[str, str]]
"""Text to go on with, or messages with ``role`` and ``content``."""


def are_several(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a list of prompts, not one of messages."""
    ok, allowed = isinstance(prompt, Sequence), "a text, messages, or a list of either"
    require(ok, "prompt", prompt, allowed, "give what is to be gone on with")
    return not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], Mapping)


def one_each(name: str, given: Any, prompts: int) -> list[Any]:
    """What each of several prompts gets: its own, or all the same.

    Raises:
        UserError: If there are not as many.
    """
    if isinstance(given, str) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        return [given] * prompts
    values = [*given]
    allowed = f"one for all, or one for each of {prompts} prompts"
    require(len(values) == prompts, name, f"{len(values)} values", allowed, "give as many")
    return values


@dataclass(frozen=True)
class Passage:
    """A retrieved chunk."""

    start: int
    """Its first token in the document [tokens]."""
    end: int
    """The place after its last one [tokens]."""
    score: float
    """Similarity to what asked; NaN for the controls."""
    text: str
    """What it says; empty where the bank was not told."""


class Conversation:
    """A text that grows turn by turn, with what was read behind it; each turn sees those before it.

    Args:
        long_context: Writes.
        memory: What was read; None: nothing. Older turns move into it when they no longer fit the local context.
        row: Which of its rows.
        window: Tokens of the local context [tokens]; None: as the model says.

    Raises:
        UserError: If the bank was made with something else.
    """

    def __init__(
        self, long_context: LongContext, memory: MemoryBank | None = None, row: int = 0, window: int | None = None
    ) -> None:
        self._long_context, self._row = long_context, row
        self._model, self._tokenizer = long_context.model, long_context.tokenizer
        if memory is None:
            memory = long_context.retrieval.new_bank(1, 0)
        long_context.check(memory)
        require_whole("row", row)
        require(0 <= row < memory.rows, "row", row, f"0 to {memory.rows - 1}, a row of the bank", "correct it")
        self.memory = memory
        self.context = LocalContext(long_context, memory, row, long_context.window(window))
        self._messages: list[Mapping[str, str]] = []
        self._shown = ""  # what the chat template wrote before the last answer
        self._written = self.context.ids[0]  # (T,), of which the context has not read the last token yet

    @property
    def passages(self) -> list[Passage]:
        """What the last turn was written with, best first."""
        kept, tokenizer = self.memory.row(self._row).tokens, self._tokenizer
        found = [
            Passage(start, start + length, score, tokenizer.decode(kept[start : start + length]))
            for start, (length, score) in self.context.found.items()
        ]
        return sorted(found, key=lambda p: -p.score)

    def say(self, prompt: Prompt, *, query: str | None = None, **options: Any) -> Any:
        """Write on after a prompt; see :meth:`MemLong.generate` for arguments and results.

        Raises:
            UserError: For an empty prompt, or one that does not fit the local context.
        """
        tokenizer = self._tokenizer
        whole, text, asked = self._begin_turn(prompt)
        new = self._tokens(text)
        begin = len(self._written) + len(new)
        found, ended = self._generate(new, query or asked, options)
        whole_dict = bool(options.get("return_dict_in_generate"))
        sequences = found.sequences if whole_dict else found
        self._end_turn(prompt, whole, self._without_padding(sequences[0], begin), begin)
        if ended:
            raise KeyboardInterrupt  # the turn ends where it was; the conversation can go on
        if whole_dict:
            return found
        texts = [tokenizer.decode(row[begin:], skip_special_tokens=True) for row in sequences]
        return texts if len(texts) > 1 else texts[0]

    def check(self, prompts: Sequence[Prompt], options: dict[str, Any]) -> None:
        """Refuse prompts, each as the first turn, and options of ``generate`` before anything has been read.

        Raises:
            UserError: As :meth:`say` would.
        """
        for prompt in prompts:
            self.require_prompt(prompt)
        rehearse(self._model.backbone, self._tokenizer, options)

    def require_prompt(self, prompt: Prompt) -> None:
        """Raise what :meth:`say` would for an empty prompt, or one that does not fit."""
        self._require_room(self._tokens(self._begin_turn(prompt)[1]))

    def _tokens(self, text: str) -> list[int]:
        """A turn's tokens, as they follow what was said."""
        new: list[int] = tokenise(self._tokenizer, [text])[0].tolist()
        if not len(self._written) and new and new[0] == self._model.bos:
            new = new[1:]  # the context begins with it by itself
        special = self._tokenizer.all_special_ids
        if len(self._written) and new and new[0] == int(self._written[-1]) and new[0] in special:
            new = new[1:]  # the answer before has ended with it
        return new

    def _require_room(self, tokens: Sequence[int]) -> None:
        room = self.context.window
        allowed = f"from one to {room} tokens, the window"
        fix = "read long texts into memory (model.read) and ask about them, or raise window"
        require(0 < len(tokens) <= room, "prompt", f"{len(tokens)} tokens", allowed, fix)

    def generate_from_tokens(self, tokens: Sequence[int], query: str, **options: Any) -> Any:
        """As :meth:`say`, for a prompt that is tokens already; gives what transformers' ``generate`` gives.

        Args:
            tokens: What is added to the text so far.
            query: Text that retrieves for it.
            **options: See :meth:`MemLong.generate`.
        """
        found, ended = self._generate(tokens, query, options)
        sequences = found.sequences if options.get("return_dict_in_generate") else found
        self._written = self._without_padding(sequences[0], len(self._written) + len(tokens))
        if ended:
            raise KeyboardInterrupt
        return found

    def _generate(self, tokens: Sequence[int], query: str, options: dict[str, Any]) -> tuple[Any, bool]:
        """What was generated, and whether Ctrl-C ended it, between two tokens."""
        model = self._model
        self._require_room(tokens)
        ids = torch.cat([self._written, torch.tensor(tokens, device=model.device)])[None]
        try:
            with evaluating(model), deferred_interrupt() as pressed:
                self.context.retrieve_for_prompt(self._long_context.embed_texts([query])[0])
                adapter = GenerateAdapter(model.backbone, self.context.logits)
                found = adapter.generate(ids, **loop_options(options, self._tokenizer, pressed))
                self.context.count_use()
                return found, pressed()
        except BaseException as error:
            nothing_read = self.context.ids.shape[1] <= len(self._written)
            if not isinstance(error, ValueError | TypeError) or not nothing_read:
                self._reset()  # a pass may have been broken off in the middle
                raise
            if isinstance(error, UserError):
                raise
            raise refused(error) from error

    def _without_padding(self, ids: Tensor, begin: int) -> Tensor:
        """A text (T,) up to the token that ends it; shorter ones of several are padded."""
        ends = self._model.backbone.generation_config.eos_token_id  # type: ignore[union-attr]
        known = [ends] if isinstance(ends, int) else ends or []
        ended = next((place for place, token in enumerate(ids[begin:].tolist(), begin + 1) if token in known), None)
        return ids[:ended]

    def _reset(self) -> None:
        """Forget what the context has read; it is read again with the next turn."""
        self.context.close()
        self.context = LocalContext(self._long_context, self.memory, self._row, self.context.window)

    def _end_turn(self, prompt: Prompt, whole: str, written: Tensor, begin: int) -> None:
        """Keep what the next turn goes on from; of a text (T,), the answer begins at ``begin``."""
        self._written = written
        if not isinstance(prompt, str):
            answer = self._tokenizer.decode(written[begin:], skip_special_tokens=True)
            self._messages += [*prompt, {"role": "assistant", "content": answer}]
            self._shown = whole

    def _begin_turn(self, prompt: Prompt) -> tuple[str, str, str]:
        """All messages as a chat template writes them, the text that is new, and what of it asks."""
        if isinstance(prompt, str):
            require(
                bool(prompt.strip()), "prompt", prompt, "some text", "write a question, or a beginning to go on with"
            )
            return "", prompt, prompt
        messages = [*self._messages, *prompt]
        ok = bool(prompt) and all({"role", "content"} <= set(m) for m in prompt) and bool(prompt[-1]["content"].strip())
        require(ok, "prompt", prompt, "messages with role and content, the last one not empty", "correct them")
        tokenizer = self._tokenizer
        fix = "give a text, or choose an instruction-tuned backbone"
        require(bool(tokenizer.chat_template), "prompt", "messages", "text: this backbone has no chat template", fix)
        whole = self._apply_chat_template(messages)
        return whole, self._unread_text(whole, prompt), prompt[-1]["content"]

    def _apply_chat_template(self, messages: Sequence[Mapping[str, str]], answering: bool = True) -> str:
        tokenizer = self._tokenizer
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering))

    def _unread_text(self, whole: str, prompt: Sequence[Mapping[str, str]]) -> str:
        """What of all messages the context has not read: the end of the last answer, and the new ones.

        Compared as text: tokens of what was said are not those the template makes of it, since an answer is kept as it
        was written, token by token.
        """
        if not self._messages:
            return whole
        before, answer = (
            self._apply_chat_template(self._messages, answering=False),
            self._messages[-1]["content"].strip(),
        )
        said = before.removeprefix(self._shown)
        if whole.startswith(before) and before.startswith(self._shown) and answer in said:
            return said[said.rindex(answer) + len(answer) :] + whole.removeprefix(before)
        # A template that writes earlier turns in another way than they were said: the new ones by themselves.
        return self._apply_chat_template(prompt)

    def close(self) -> None:
        """Take out of the bank what this conversation has moved into it."""
        self.context.close()

    def __enter__(self) -> "Conversation":
        """For ``with``: closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """See :meth:`close`."""
        self.close()
