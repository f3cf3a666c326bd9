"""What a user could do instead of a memory, on the same weights: longer windows, stretched positions, sinks, a prompt.

Legend: T tokens of a document, S scored tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.backbone import check_stretch, stretched
from lightning_memlong.config import require
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.generation import PlainContext, SinkCache, Sliding
from lightning_memlong.retrieval import CONTROL_SELECTIONS, Retrieval

AlternativeKind = Literal["trained_window", "yarn", "dynamic_ntk", "sinks", "prompt"]
SINKS = 4
"""Tokens that StreamingLLM keeps for good (arXiv 2309.17453, section 3)."""


class Alternative(ABC):
    """A way of going on from a long text without a memory bank.

    Args:
        local: Tokens of the window [tokens].
        longest: Those the backbone was made for [tokens].
    """

    title: str
    needs_chunks = False
    """Whether it is given what was retrieved."""

    def __init__(self, local: int, longest: int) -> None:
        self.local, self.longest = local, longest

    def takes(self, length: int) -> bool:
        """Whether there is anything of its own to be measured at a length of context."""
        return length > self.local

    @abstractmethod
    def held(self, length: int) -> int:
        """Tokens whose keys and values, of all layers, are held while the last token is predicted."""

    def seen(self, tokens: np.ndarray, chunks: Sequence[int], room: int = 0) -> np.ndarray:
        """What is read of a context (T,).

        Args:
            tokens: The context.
            chunks: First tokens of the chunks that were retrieved, by their place in the context.
            room: Tokens that will follow it.
        """
        return tokens

    @contextmanager
    def opened(self, subject: Subject, length: int) -> Iterator[PlainContext]:
        """What reads a text of so many tokens, nothing of it yet; the model is as before when the block ends."""
        yield PlainContext(subject.model, subject.autocast)

    def losses(self, subject: Subject, tokens: np.ndarray, scored: int, chunks: Sequence[int]) -> Tensor:
        """Losses (S,) float32 on the CPU of the last tokens of a context (T,).

        Args:
            subject: Whose model.
            tokens: The context, the scored tokens at its end.
            scored: How many.
            chunks: As for :meth:`seen`.
        """
        ids = torch.from_numpy(self.seen(tokens, chunks).astype(np.int64))[None].to(subject.device)
        with self.opened(subject, ids.shape[1]) as context:
            hidden = context.read(ids, scored + 1)
        with torch.no_grad(), subject.autocast():
            losses = subject.model.head.loss(hidden, ids[:, -hidden.shape[1] :], reduction="none")
        return losses[0, -scored:].float().cpu()


class TrainedWindow(Alternative):
    """The plain backbone with as long a window as it was made for."""

    title = "trained window"

    def held(self, length: int) -> int:
        """See :class:`Alternative`."""
        return min(length, self.longest)

    def seen(self, tokens: np.ndarray, chunks: Sequence[int], room: int = 0) -> np.ndarray:
        """See :class:`Alternative`."""
        return tokens[max(0, len(tokens) + room - self.longest) :]


class Yarn(Alternative):
    """The whole context in a plain window, positions stretched by YaRN."""

    title = "YaRN, whole context"
    stretch: Literal["yarn", "dynamic"] = "yarn"

    def takes(self, length: int) -> bool:
        """Within what the backbone was made for there is nothing to stretch."""
        return length > self.longest

    def held(self, length: int) -> int:
        """See :class:`Alternative`."""
        return length

    @contextmanager
    def opened(self, subject: Subject, length: int) -> Iterator[PlainContext]:
        """See :class:`Alternative`."""
        with stretched(subject.model.backbone, self.stretch, length):
            yield PlainContext(subject.model, subject.autocast)


class DynamicNTK(Yarn):
    """The same by dynamic NTK-aware scaling."""

    title = "dynamic NTK, whole context"
    stretch = "dynamic"


class Sinks(Alternative):
    """StreamingLLM: the whole context goes by, the first tokens and the newest ones are kept.

    Args:
        local: Tokens of the window, those being read included [tokens].
        longest: Those the backbone was made for [tokens].
        stride: Tokens read at once [tokens].
    """

    title = f"{SINKS} sinks and window"

    def __init__(self, local: int, longest: int, stride: int) -> None:
        super().__init__(local, longest)
        self.sliding = Sliding(SINKS, local, stride)

    def held(self, length: int) -> int:
        """See :class:`Alternative`."""
        return min(length, self.local + SINKS)

    @contextmanager
    def opened(self, subject: Subject, length: int) -> Iterator[PlainContext]:
        """See :class:`Alternative`."""
        yield PlainContext(subject.model, subject.autocast, self.sliding)


class InPrompt(Alternative):
    """The retrieved chunks as text before the window (retrieval-augmented generation).

    Args:
        local: Tokens of the window [tokens].
        longest: Those the backbone was made for [tokens].
        chunk_size: Tokens of a chunk [tokens].
        top_k: Chunks put before the window [chunks].
    """

    title = "chunks in the prompt"
    needs_chunks = True

    def __init__(self, local: int, longest: int, chunk_size: int, top_k: int) -> None:
        super().__init__(local, longest)
        self.chunk_size, self.top_k = chunk_size, top_k

    def held(self, length: int) -> int:
        """See :class:`Alternative`."""
        return min(length, self.local + self.top_k * self.chunk_size)

    def seen(self, tokens: np.ndarray, chunks: Sequence[int], room: int = 0) -> np.ndarray:
        """See :class:`Alternative`."""
        begin = max(0, len(tokens) + room - self.local)  # no token stands there twice
        parts = [tokens[start : min(start + self.chunk_size, begin)] for start in sorted(chunks)]
        return np.concatenate([*parts, tokens[begin:]])


TITLES = tuple(way.title for way in (TrainedWindow, Yarn, DynamicNTK, Sinks, InPrompt))
"""Names of rows in tables."""


def open_alternatives(
    kinds: Sequence[str], subject: Subject, longest: int, top_k: int, stride: int
) -> Mapping[str, Alternative]:
    """The alternatives by the names they have in tables.

    Args:
        kinds: As in ``evaluation.alternatives``.
        subject: Whose model and windows.
        longest: Tokens the backbone was made for [tokens].
        top_k: Chunks put into a prompt, at most as many as fit [chunks].
        stride: Tokens by which a window slides; less than the window, or nothing stays in it but sinks [tokens].

    Raises:
        UserError: For one that the backbone cannot do.
    """
    key, local, chunk = "evaluation.alternatives", subject.data.window, subject.memory.chunk_size
    found: list[Alternative] = []
    for kind in dict.fromkeys(kinds):
        if kind in ("yarn", "dynamic_ntk"):
            check_stretch(subject.model.backbone, key, kind)
            found.append((Yarn if kind == "yarn" else DynamicNTK)(local, longest))
        elif kind == "sinks":
            allowed = "it where --data.stride is less than --data.window: else nothing but sinks would stay"
            require(stride < local, key, "sinks", allowed, "lower --data.stride, or leave it out")
            SinkCache(subject.model, SINKS)  # says now if the backbone cannot
            found.append(Sinks(local, longest, stride))
        elif kind == "prompt":
            found.append(InPrompt(local, longest, chunk, top_k))
        else:
            found.append(TrainedWindow(local, longest))
    return {alternative.title: alternative for alternative in found}


def prompting(subject: Subject, settings: Mapping[str, dict[str, Any]], longest: int) -> tuple[str, Retrieval]:
    """Whose chunks are put into a prompt: the first setting that chooses by what is asked, and how it does.

    As many chunks as fit before the window.

    Args:
        subject: Whose windows.
        settings: Name -> fields of the memory group that differ.
        longest: Tokens the backbone was made for [tokens].

    Raises:
        UserError: If there is none, or nothing fits.
    """
    key = "evaluation.alternatives"
    given = {name: {k: v for k, v in row.items() if k != "model"} for name, row in settings.items()}
    known = {name: subject.retrieval(options, f"evaluation.settings.{name}").config for name, options in given.items()}
    names = [n for n, c in known.items() if c.selection not in CONTROL_SELECTIONS and c.query != "current"]
    allowed = "beside a setting that retrieves, and does not leak"
    require(bool(names), key, "prompt", allowed, "name one in evaluation.settings")
    room = (longest - subject.data.window) // subject.memory.chunk_size
    allowed = f"a window with room for a chunk within the {longest:,} tokens the backbone was made for"
    require(room >= 1, key, "prompt", allowed, "lower --data.window, or leave it out")
    most = min(room, known[names[0]].top_k)
    way = subject.retrieval({**given[names[0]], "top_k": most, "candidates": None, "granularity": "window"}, key)
    return names[0], way
