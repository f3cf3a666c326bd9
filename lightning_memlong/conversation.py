"""Turns of a conversation about what was read: prompts in, text out, with the passages that were retrieved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_memlong.asking import embed_texts
from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import require
from lightning_memlong.errors import UserError
from lightning_memlong.generation import LocalContext, Writer

if TYPE_CHECKING:
    from lightning_memlong.model import MemLong

Prompt = str | Sequence[Mapping[str, str]]
"""Text to go on with, or messages with ``role`` and ``content``."""


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
        model: Writes.
        memory: What was read; None: nothing. Older turns move into it when they no longer fit the local context.
        row: Which of its rows.
        window: Tokens of the local context [tokens]; None: as the model says.

    Raises:
        UserError: If the bank was made with something else.
    """

    def __init__(
        self, model: "MemLong", memory: MemoryBank | None = None, row: int = 0, window: int | None = None
    ) -> None:
        self._model, self._row = model, row
        if memory is None:
            memory = model.retrieval.new_bank(1, 0)
        model.check(memory)
        require(0 <= row < memory.rows, "row", row, f"0 to {memory.rows - 1}, a row of the bank", "correct it")
        self.memory, self._mark = memory, memory.mark(row)
        self.context = LocalContext(model, memory, row, model.window(window))
        self._messages: list[Mapping[str, str]] = []
        self._shown = ""  # the messages so far, as the chat template writes them
        self._written = self.context.ids[0]  # (T,), of which the context has not read the last token yet

    @property
    def passages(self) -> list[Passage]:
        """What the last turn was written with, best first."""
        kept, tokenizer = self.memory.tokens(self._row), self._model.retrieval.tokenizer
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
        tokenizer, model = self._model.retrieval.tokenizer, self._model
        whole, text, asked = self._turn(prompt)
        new = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not len(self._written) and new and new[0] == model.bos:
            new = new[1:]  # the context begins with it by itself
        if len(self._written) and new and new[0] == int(self._written[-1]) and new[0] in tokenizer.all_special_ids:
            new = new[1:]  # the answer before has ended with it
        begin = len(self._written) + len(new)
        try:
            found = self.go_on(new, query or asked, **options)
        except KeyboardInterrupt:  # an answer broken off is one that ends there
            self._turn_ends(prompt, whole, self.context.ids[0], begin)
            raise
        if options.get("return_dict_in_generate"):
            return found
        self._turn_ends(prompt, whole, found[0], begin)
        texts = [tokenizer.decode(row[begin:], skip_special_tokens=True) for row in found]
        return texts if len(texts) > 1 else texts[0]

    def go_on(self, tokens: Sequence[int], query: str, **options: Any) -> Any:
        """As :meth:`say`, for a prompt that is tokens already; gives what transformers' ``generate`` gives.

        Args:
            tokens: What is added to the text so far.
            query: Text that retrieves for it.
            **options: See :meth:`MemLong.generate`.
        """
        model, room = self._model, self.context.window
        allowed = f"from one to {room} tokens, the window"
        fix = "read long texts into memory (model.read) and ask about them, or raise window"
        require(0 < len(tokens) <= room, "prompt", f"{len(tokens)} tokens", allowed, fix)
        if "stop_strings" in options:
            options.setdefault("tokenizer", model.retrieval.tokenizer)
        was_training = model.training
        model.eval()
        try:
            self.context.ask(embed_texts(model, model.retrieval, [query], model.autocast)[0])
            ids = torch.cat([self._written, torch.tensor(tokens, device=model.device)])[None]
            return Writer(model, self.context).generate(ids, use_cache=False, **options)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(
                f"generation: {str(error).splitlines()[0]} Allowed: options of transformers' generate. Fix: correct it."
            ) from error
        finally:
            model.train(was_training)

    def _turn_ends(self, prompt: Prompt, whole: str, written: Tensor, begin: int) -> None:
        """Keep what the next turn goes on from; of a text (T,), the answer begins at ``begin``."""
        self._written = written
        if not isinstance(prompt, str):
            answer = self._model.retrieval.tokenizer.decode(written[begin:], skip_special_tokens=True)
            self._messages += [*prompt, {"role": "assistant", "content": answer}]
            self._shown = whole + answer

    def _turn(self, prompt: Prompt) -> tuple[str, str, str]:
        """All messages as a chat template writes them, the text that is new, and what of it asks."""
        if isinstance(prompt, str):
            require(
                bool(prompt.strip()), "prompt", prompt, "some text", "write a question, or a beginning to go on with"
            )
            return "", prompt, prompt
        messages = [*self._messages, *prompt]
        ok = bool(prompt) and all({"role", "content"} <= set(m) for m in prompt) and bool(prompt[-1]["content"].strip())
        require(ok, "prompt", prompt, "messages with role and content, the last one not empty", "correct them")
        tokenizer = self._model.retrieval.tokenizer
        fix = "give a text, or choose an instruction-tuned backbone"
        require(bool(tokenizer.chat_template), "prompt", "messages", "text: this backbone has no chat template", fix)
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        new = whole.removeprefix(self._shown)
        if not whole.startswith(self._shown):  # a template that writes earlier turns in another way
            new = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        return whole, new, prompt[-1]["content"]

    def close(self) -> None:
        """Take out of the bank what this conversation has moved into it."""
        self.memory.go_back(self._row, self._mark)
