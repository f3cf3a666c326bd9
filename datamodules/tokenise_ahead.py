"""Documents into tokens, ahead of the model, in worker processes that hold no state of their own."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lightning_memlong.text import tokenise

from .shuffle import Sample


class _Tokenised(Dataset[Any]):
    """Turns what the sampler hands over into tokens: in a worker process, or in this one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: bool) -> None:
        self.tokenizer, self.control = tokenizer, control

    def __getitem__(self, sample: Sample) -> tuple[Sample, np.ndarray]:
        tokens = tokenise(self.tokenizer, [sample.document.text], self.control)[0]
        return replace(sample, document=replace(sample.document, text="")), tokens


def _as_is(item: Any) -> Any:
    return item


def _single_threaded(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork


def tokenise_ahead(
    samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, workers: int, control: bool = False
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Samples without their text, and its tokens (T,), in the order of the samples whatever the number of workers.

    Args:
        samples: What to tokenise; drawn in this process, a few ahead of what is asked for.
        tokenizer: Turns text into tokens.
        workers: Processes; 0 tokenises in this one, when a sample is asked for.
        control: Whether what is spelled like a special token becomes one.
    """
    loader: Any = DataLoader(
        _Tokenised(tokenizer, control),
        sampler=samples,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_single_threaded,
        # Of its own: making an iterator must not draw from the random state that a resume restores.
        generator=torch.Generator(),
    )
    return iter(loader)
