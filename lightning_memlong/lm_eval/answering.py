"""What a model with a bank behind it says after a prompt: how likely given tokens are, and what it writes.

Legend: V tokens of the vocabulary, n tokens that are scored.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_memlong.bank import BankView
from lightning_memlong.config import require
from lightning_memlong.errors import UserError
from lightning_memlong.generation import (
    GenerateAdapter,
    LocalContext,
    LongContext,
    PlainContext,
    evaluating,
    loop_options,
    refused,
)


class Answers(Protocol):
    """Something that has read a prompt, whatever it keeps of it: a row of a table of answers."""

    def score(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses (n,) of tokens that may follow, and whether each is the likeliest (n,)."""

    def write(self, stops: Sequence[str] = (), **options: Any) -> str:
        """The text that follows, up to one of the stop texts; options are those of transformers' ``generate``."""

    def retrieved(self) -> list[tuple[int, int]]:
        """Where the chunks begin and end that were retrieved for the prompt [tokens]."""


class Prompt:
    """A prompt that was read once, after which several answers are scored and written.

    Args:
        context: Has nothing of it yet.
        long_context: Whose model and tokenizer.
        tokens: Of the prompt, one or more, with what the context holds before them.
        places: Where the chunks begin and end that were retrieved for it [tokens].
    """

    def __init__(
        self,
        context: LocalContext | PlainContext,
        long_context: LongContext,
        tokens: Sequence[int],
        places: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._context, self._long_context, self._tokens, self._places = context, long_context, list(tokens), places
        if len(tokens) > 1:  # what is scored or written begins with the last token
            context.logits(self._ids(tokens[:-1]))

    def score(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses (n,) of tokens that may follow, and whether each is the likeliest (n,)."""
        with closing(self._context.fork()) as fork:
            return losses_of(fork.logits(self._ids([*self._tokens, *tokens[:-1]]), len(tokens)), tokens)

    def write(self, stops: Sequence[str] = (), **options: Any) -> str:
        """The text that follows, up to one of the stop texts.

        Raises:
            UserError: For options that transformers' ``generate`` refuses.
        """
        tokenizer, begin = self._long_context.tokenizer, len(self._tokens)
        if stops:
            options["stopping_criteria"] = [stop_at(tokenizer, stops, begin)]
        try:
            with closing(self._context.fork()) as fork:
                # Typed as any module, and a decoder: it was recognised when it was wrapped.
                adapter = GenerateAdapter(self._long_context.model.backbone, fork.logits)  # type: ignore[arg-type]
                ids = adapter.generate(self._ids(self._tokens), **loop_options(options, tokenizer, lambda: False))
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise refused(error) from error
        text = str(tokenizer.decode(ids[0, begin:], skip_special_tokens=True))
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def retrieved(self) -> list[tuple[int, int]]:
        """Where the chunks begin and end that were retrieved for the prompt [tokens]."""
        return list(self._places)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self._long_context.model.device)


@contextmanager
def prompted(
    long_context: LongContext, bank: BankView | None, tokens: Sequence[int], question: str, window: int, row: int = 0
) -> Iterator[Prompt]:
    """A prompt read after what a row of a bank holds; what is written may move into the row until the block ends.

    Args:
        long_context: Reads and writes.
        bank: What was read before; None: nothing.
        tokens: Of the prompt, from one to ``window``.
        question: Text that retrieves for it.
        window: Tokens of the local context.
        row: Of the bank.
    """
    memory: BankView = long_context.retrieval.new_bank(1, 0) if bank is None else bank
    with (
        evaluating(long_context.model),
        torch.no_grad(),
        closing(LocalContext(long_context, memory, row, window)) as context,
    ):
        context.retrieve_for_prompt(long_context.embed_texts([question])[0])
        places = [(start, start + length) for start, (length, _) in context.found.items()]
        yield Prompt(context, long_context, tokens, places)


def cut_off(tokens: int, room: int, chunk_size: int) -> int:
    """How many of so many tokens lie before the last ``room`` of them: whole chunks, if anything is left after them."""
    least = max(0, tokens - room)
    whole = -(-least // chunk_size) * chunk_size
    return whole if whole < tokens else least


def chat_text(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Messages as the backbone's template writes them.

    Where no answer is to begin, the last message is the beginning of one (lm-eval's ``gen_prefix``), and stays open.

    Raises:
        UserError: If it has none.
    """
    ok = bool(tokenizer.chat_template)
    allowed = "a backbone with a chat template"
    require(ok, "apply_chat_template", True, allowed, "leave --apply_chat_template (evaluation.chat) out")
    how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks of lm-eval call the tokens of an answer; the first that is given counts, as in lm-eval's own models."""


def writing_options(given: Mapping[str, Any], longest: int = 256) -> tuple[list[str], dict[str, Any]]:
    """Stop texts, and options of transformers' ``generate``, of what a task of lm-eval asks for.

    Args:
        given: Its ``generation_kwargs``.
        longest: Tokens of an answer, where it does not say [tokens].
    """
    options = dict(given)
    stops = options.pop("until", None) or []
    named = [value for name in LENGTHS if (value := options.pop(name, None)) is not None]
    options["max_new_tokens"] = int([*named, longest][0])
    # Greedy unless a task asks for sampling, whatever the backbone's own settings are; a temperature asks for it.
    if float(options.get("temperature") or 0.0):
        options.setdefault("do_sample", True)
    else:
        options = {**options, "do_sample": False}
        options.pop("temperature", None)
    return [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop], options


def stop_at(tokenizer: Any, stops: Sequence[str], begin: int) -> Any:
    """Ends an answer that holds one of the stop texts, as lm-eval's own models do: what was asked has no say."""

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        text = tokenizer.decode(ids[0, begin:])
        return torch.full((len(ids),), any(stop in text for stop in stops), device=ids.device)

    return stop


def losses_of(logits: Tensor, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of logits (1, n, V) and the tokens that came: losses (n,) and whether each was the likeliest (n,)."""
    target = torch.tensor(list(wanted), device=logits.device)
    losses = torch.nn.functional.cross_entropy(logits[0].float(), target, reduction="none")
    return losses, logits[0].argmax(-1) == target
