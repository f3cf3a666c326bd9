"""How RULER's documents are answered: memory off, with a bank behind the window, or what could be done instead.

Legend: T tokens of a prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lightning_memlong.bank import BankView
from lightning_memlong.evaluation import Subject
from lightning_memlong.evaluation.alternatives import Alternative, open_alternatives, prompting
from lightning_memlong.evaluation.cost import computing_bytes, memory_bytes, token_bytes
from lightning_memlong.generation import LongContext, evaluating
from lightning_memlong.lm_eval.answering import Answers, Prompt, prompted
from lightning_memlong.lm_eval.ruler_tasks import RulerDocument
from lightning_memlong.retrieval import Retrieval, retrieve_for

OFF = "off"
SLIDES = 4
"""A window that slides over a prompt does so by this part of it; so much of it is gone when the question is read."""


@dataclass(frozen=True)
class Asked:
    """A document as tokens, and what is scored after it."""

    document: RulerDocument
    tokens: np.ndarray
    """(T,) of the prompt."""
    cut: int
    """How many of them are read into a bank; the others are local."""
    room: int
    """Tokens there must be room for after them, for an answer."""
    answer: list[int]
    wrong: list[int]
    """The answer to another document."""
    needles: list[tuple[int, int]]
    """Where what says the answers begins and ends, of what is in the bank [tokens]."""


@dataclass(frozen=True)
class Way:
    """A row of the table."""

    answers: Callable[[Asked, BankView | None, int], AbstractContextManager[Answers]]
    """What has read a prompt, given the bank with what is before the window, and its row."""
    held: Callable[[int], int]
    """Bytes of keys and values that are held after a prompt of so many tokens."""
    bank: str | None = None
    """The setting whose bank it is given; None: it needs none."""
    takes: Callable[[int], bool] = lambda length: True
    """Whether there is anything of its own to be measured at a length."""


def open_ways(
    subject: Subject, settings: Mapping[str, dict[str, object]], kinds: Sequence[str], longest: int
) -> tuple[dict[str, Way], dict[str, Retrieval]]:
    """What answers, by name, and the settings of those that retrieve.

    Args:
        subject: Whose model.
        settings: Name -> fields of the memory group that differ.
        kinds: What could be done instead, as in ``evaluation.alternatives``.
        longest: Tokens of the longest documents, for a backbone that does not say for how many it was made.

    Raises:
        UserError: For a field that is not there, or an alternative that the backbone cannot do.
    """
    window = subject.data.window
    retrievals = {
        name: subject.row_retrieval(options, f"evaluation.settings.{name}") for name, options in settings.items()
    }
    plain = long_context_of(subject, next(iter(retrievals.values()), None) or subject.retrieval())
    token = token_bytes(subject.model.backbone, element=computing_bytes(subject))
    ways = {OFF: Way(partial(_in_window, plain, window), lambda length: min(length, window) * token)}
    for name, retrieval in retrievals.items():
        answers = partial(_in_window, long_context_of(subject, retrieval), window)
        ways[name] = Way(answers, partial(memory_bytes, subject, window), name)
    longest = getattr(subject.model.config, "max_position_embeddings", None) or longest
    bank, chosen = prompting(subject, settings, longest) if "prompt" in kinds else (None, None)
    top_k = 0 if chosen is None else chosen.config.top_k
    stride = max(1, window // SLIDES)
    for title, alternative in open_alternatives(kinds, subject, longest, top_k, stride).items():
        of_bank = bank if alternative.needs_chunks else None
        instead = partial(_instead, alternative, subject, plain, chosen)
        ways[title] = Way(instead, partial(_held, alternative, token), of_bank, alternative.takes)
    return ways, retrievals


def long_context_of(subject: Subject, retrieval: Retrieval) -> LongContext:
    """The model with the settings of a row."""
    return LongContext(subject.model, retrieval.config, subject.tokenizer, retrieval.retriever, subject.autocast)


def _held(alternative: Alternative, token: int, length: int) -> int:
    return alternative.held(length) * token


def _in_window(
    long_context: LongContext, window: int, asked: Asked, bank: BankView | None, row: int
) -> AbstractContextManager[Answers]:
    """A prompt's end in a window, what is before it in a bank, or nowhere."""
    local = asked.tokens[asked.cut :].tolist()
    return prompted(long_context, bank, local, asked.document.question, window, 0 if bank is None else row)


@contextmanager
def _instead(
    alternative: Alternative,
    subject: Subject,
    long_context: LongContext,
    chosen: Retrieval | None,
    asked: Asked,
    bank: BankView | None,
    row: int,
) -> Iterator[Answers]:
    """A prompt as one of the alternatives reads it; chunks in it are those that the question retrieves."""
    places: list[tuple[int, int]] = []
    if chosen is not None and bank is not None:
        question = long_context_of(subject, chosen).embed_texts([asked.document.question])[0]
        found = retrieve_for(chosen, bank.view(row), [question[None]])
        starts = [] if found is None else [start for start in found.positions[0].tolist() if start >= 0]
        places = [(start, start + bank.chunk_size) for start in starts]
    tokens = alternative.seen(asked.tokens, [start for start, _ in places], asked.room)
    with evaluating(subject.model), torch.no_grad(), alternative.opened(subject, len(tokens) + asked.room) as context:
        yield Prompt(context, long_context, tokens.tolist(), places)
