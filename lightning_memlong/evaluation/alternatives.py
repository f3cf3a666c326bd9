"""What a user could do instead of a memory, on the same weights: longer windows, stretched positions, sinks, a prompt.

Legend: T tokens of a document, S scored tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.backbone import check_stretch, stretched
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.generation import SinkCache
from lightning_memlong.model import ForwardContext, decode

AlternativeKind = Literal["trained_window", "yarn", "dynamic_ntk", "sinks", "prompt"]
SINKS = 4
"""Tokens that StreamingLLM keeps for good (arXiv 2309.17453, section 3)."""


class Alternative(ABC):
    """A way of predicting the end of a document without a memory bank.

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
    def losses(self, subject: Subject, tokens: np.ndarray, scored: int, chunks: Sequence[int]) -> Tensor:
        """Losses (S,) of the last tokens of a context (T,).

        Args:
            subject: Whose model.
            tokens: The context, the scored tokens at its end.
            scored: How many.
            chunks: First tokens of the chunks that were retrieved, by their place in the context.
        """

    @abstractmethod
    def held(self, length: int) -> int:
        """Tokens whose keys and values, of all layers, are held while the last token is predicted."""


class TrainedWindow(Alternative):
    """The plain backbone with as long a window as it was made for."""

    title = "trained window"

    def losses(self, subject: Subject, tokens: np.ndarray, scored: int, chunks: Sequence[int]) -> Tensor:
        """See :class:`Alternative`."""
        return dense_losses(subject, tokens[-self.held(len(tokens)) :], scored)

    def held(self, length: int) -> int:
        """See :class:`Alternative`."""
        return min(length, self.longest)


class Yarn(Alternative):
    """The whole context in a plain window, positions stretched by YaRN."""

    title = "YaRN, whole context"
    stretch: Literal["yarn", "dynamic"] = "yarn"

    def takes(self, length: int) -> bool:
        """Within what the backbone was made for there is nothing to stretch."""
        return length > self.longest

    def losses(self, subject: Subject, tokens: np.ndarray, scored: int, chunks: Sequence[int]) -> Tensor:
        """See :class:`Alternative`."""
        with stretched(subject.model.backbone, self.stretch, len(tokens)):
            return dense_losses(subject, tokens, scored)

    def held(self, length: int) -> int:
        """See :class:`Alternative`."""
        return length


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
        self.stride = stride

    @torch.no_grad()
    def losses(self, subject: Subject, tokens: np.ndarray, scored: int, chunks: Sequence[int]) -> Tensor:
        """See :class:`Alternative`."""
        model, ids = subject.model, with_first_token(subject, tokens)
        cache, kept = SinkCache(model, SINKS), SINKS + self.local - self.stride
        steps = max(0, -(-(len(tokens) - self.local) // self.stride))
        begin, end = 0, ids.shape[1] - steps * self.stride
        last = hidden = ids.new_empty(1, 0, model.config.hidden_size, dtype=torch.float32)
        while begin < ids.shape[1]:
            if cache.length > kept:
                cache.evict(cache.length - (kept - SINKS), kept + self.stride)
            with subject.autocast():
                hidden = decode(model.backbone, ids[:, begin:end], ForwardContext(), cache.of_backbone)
            joined = torch.cat([last.to(hidden.dtype), hidden], dim=1)
            last, begin, end = hidden[:, -1:], end, end + self.stride
        return head_losses(subject, joined, ids, scored)

    def held(self, length: int) -> int:
        """See :class:`Alternative`."""
        return min(length, self.local + SINKS)


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

    def losses(self, subject: Subject, tokens: np.ndarray, scored: int, chunks: Sequence[int]) -> Tensor:
        """See :class:`Alternative`."""
        parts = [tokens[start : start + self.chunk_size] for start in sorted(chunks)]
        return dense_losses(subject, np.concatenate([*parts, tokens[-self.local :]]), scored)

    def held(self, length: int) -> int:
        """See :class:`Alternative`."""
        return min(length, self.local + self.top_k * self.chunk_size)


TITLES = tuple(way.title for way in (TrainedWindow, Yarn, DynamicNTK, Sinks, InPrompt))
"""Names of rows in tables."""


def open_alternatives(kinds: Sequence[str], subject: Subject, longest: int, top_k: int) -> Mapping[str, Alternative]:
    """The alternatives by the names they have in tables.

    Args:
        kinds: As in ``evaluation.alternatives``.
        subject: Whose model and windows.
        longest: Tokens the backbone was made for [tokens].
        top_k: Chunks put into a prompt, at most as many as fit [chunks].

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
            SinkCache(subject.model, SINKS)  # says now if the backbone cannot
            found.append(Sinks(local, longest, subject.data.stride))
        elif kind == "prompt":
            found.append(InPrompt(local, longest, chunk, top_k))
        else:
            found.append(TrainedWindow(local, longest))
    return {alternative.title: alternative for alternative in found}


def with_first_token(subject: Subject, tokens: np.ndarray) -> Tensor:
    """Tokens (T,) as the model reads them, (1, T), or T + 1 where it puts one of its own before them."""
    first = [] if subject.model.bos is None else [subject.model.bos]
    return torch.from_numpy(np.concatenate([first, tokens]).astype(np.int64))[None].to(subject.device)


@torch.no_grad()
def dense_losses(subject: Subject, tokens: np.ndarray, scored: int) -> Tensor:
    """Losses (S,) of the last tokens of a text (T,), all of it in one plain window."""
    ids = with_first_token(subject, tokens)
    with subject.autocast():
        hidden = decode(subject.model.backbone, ids, ForwardContext())
    return head_losses(subject, hidden, ids, scored)


@torch.no_grad()
def head_losses(subject: Subject, hidden: Tensor, ids: Tensor, scored: int) -> Tensor:
    """Losses (S,) float32 on the CPU of the last of some tokens (1, T), given the last hidden states of a pass."""
    labels = ids[:, -scored - 1 :]
    with subject.autocast():
        losses = subject.model.head.loss(hidden[:, -scored - 1 :], labels, reduction="none")
    return losses[0, 1:].float().cpu()
