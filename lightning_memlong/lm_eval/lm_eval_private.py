"""What is private of lm-eval: how its RULER tasks make documents, with another tokenizer, number and text.

Its functions load a tokenizer by name with ``trust_remote_code``, make 500 documents, take their haystack and their
questions from the network, and take none of that as an argument. So names of their modules are others for a while; what
they do stays theirs.
"""

import importlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any
from unittest.mock import patch

import nltk
from lm_eval.api.task import ConfigurableTask

from lightning_memlong.config import require
from lightning_memlong.errors import UserError

log = logging.getLogger(__name__)

RULER = "lm_eval.tasks.ruler"
NEEDLES = f"{RULER}.prepare_niah"
DOWNLOAD_S = 10.0
"""How long nltk's server may take to answer [s]; nltk itself would wait for ever."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WITHOUT_BARS = {"tqdm": lambda items, **_: items}
GENERATORS = ("generate_samples", "sys_vartrack_w_noise_random", "sys_word_pair_random", "sys_kwext")
"""Functions that take a number of documents, which their callers write as 500."""

Names = dict[str, Any]
"""Those of a module."""


@contextmanager
def documents_made_with(other_names: Callable[[Names], Mapping[str, Any]]) -> Iterator[None]:
    """While this lasts, functions that make a task's documents find other things under some names of their module.

    Args:
        other_names: Given the names of such a module, what else they mean.
    """
    download = ConfigurableTask.download

    def with_others(task: Any, *args: Any, **kwargs: Any) -> Any:
        names = getattr(task.config.custom_dataset, "__globals__", {})
        with sentences_of(names), swapped(names, other_names(names)):
            return download(task, *args, **kwargs)

    with patch.object(ConfigurableTask, "download", with_others):
        yield


@contextmanager
def swapped(names: Names, others: Mapping[str, Any]) -> Iterator[None]:
    """Names of a module that mean something else until the block ends."""
    before = {name: names[name] for name in others if name in names}
    names.update(others)
    try:
        yield
    finally:
        for name in others:
            names.pop(name, None)
        names.update(before)


def fewer(names: Names, generator: str, documents: int, count: Callable[[str], int]) -> Callable[..., Any]:
    """A generator of a module that makes at most so many documents, without a bar of its own.

    Args:
        names: Of the module.
        generator: What it is called there.
        documents: How many.
        count: Tokens of a text.
    """
    made_by = names[generator]

    def made(*args: Any, **kwargs: Any) -> Any:
        if generator in SMALLEST:
            _require_end(SMALLEST[generator](names, kwargs, count), kwargs["max_seq_length"])
        wanted = min(documents, kwargs.get("num_samples", documents))
        with swapped(made_by.__globals__, WITHOUT_BARS):
            return made_by(*args, **{**kwargs, "num_samples": wanted})

    return made


def _smallest_chain(names: Names, asked: Names, count: Callable[[str], int]) -> int:
    """Tokens of the smallest document of variable tracking, with its example and its answer."""
    shown = asked.get("icl_example")
    example = 0 if shown is None else count(f"{shown['input']} {' '.join(shown['outputs'])}\n\n")
    text, answer = names["generate_input_output"](asked.get("incremental", 10), 1, 4, is_icl=shown is None)
    return count(f"{text} {answer}") + example + 30


def _smallest_list(names: Names, asked: Names, count: Callable[[str], int]) -> int:
    """Tokens of the smallest list of common words, with its example and its answer."""
    example, text, answer = names["generate_input_output"](10, asked["max_seq_length"])
    return count("\n".join([example, text, *(f"{n}. {word}" for n, word in enumerate(answer))])) + 120


SMALLEST = {"sys_vartrack_w_noise_random": _smallest_chain, "sys_word_pair_random": _smallest_list}
"""Generators that never end where even their smallest document is too long."""


def _require_end(needed: int, length: int) -> None:
    if needed > 0.95 * length:  # documents of as many words differ by a few tokens
        raise ValueError(f"a part of at most {length} tokens would have {needed}")


@contextmanager
def sentences_of(names: Names) -> Iterator[None]:
    """A sentence splitter for a module that plants needles in essays, where nltk's ``punkt_tab`` cannot be had."""
    if "get_haystack" not in names or splitter_is_there():
        yield
        return
    needles = vars(importlib.import_module(NEEDLES))
    needles["cached_sent_tokenize"].cache_clear()
    try:
        with swapped(needles, {"sent_tokenize": split_sentences}):
            yield
    finally:
        needles["cached_sent_tokenize"].cache_clear()


@contextmanager
def quiet() -> Iterator[None]:
    """While this lasts, lm-eval says nothing but what is an error; what its functions print goes nowhere."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def requests_of(task: Any, documents: int, chat_template: Callable[..., str] | None) -> list[Any]:
    """What a task asks a model, one request a document: with ``args`` (the prompt, and how to answer) and ``doc``.

    Args:
        task: lm-eval's.
        documents: The first so many.
        chat_template: Writes messages as the backbone's template does; None: the prompt is plain text.
    """
    chat = {"apply_chat_template": chat_template is not None, "chat_template": chat_template}
    with quiet(), swapped(vars(importlib.import_module("lm_eval.api.task")), WITHOUT_BARS):
        task.build_all_requests(limit=documents, rank=0, world_size=1, **chat)
    return list(task.instances)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: they end with a full stop, a question or an exclamation mark before a space."""
    return SENTENCE_END.split(text)


def splitter_is_there() -> bool:
    """Whether nltk has what it splits sentences with."""
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def offline() -> bool:
    """Whether the environment says that nothing is to be downloaded."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)


@contextmanager
def impatient() -> Iterator[None]:
    """While this lasts, modules of RULER can be imported, which download nltk's ``punkt_tab``: quietly, or not at all.

    Raises:
        UserError: If a package they need is missing.
    """
    download, waits = nltk.download, socket.getdefaulttimeout()

    def quickly(*args: Any, **kwargs: Any) -> bool:
        if offline():
            return False
        socket.setdefaulttimeout(DOWNLOAD_S)
        try:
            return bool(download(*args, **{**kwargs, "quiet": True}))
        finally:
            socket.setdefaulttimeout(waits)

    try:
        with swapped(vars(nltk), {"download": quickly}):
            yield
    except ImportError as error:
        if "wonderwords" not in str(error):
            raise
        raise UserError(
            "wonderwords is not installed, which RULER takes its words from. Allowed: version 2.2 or newer. "
            "Fix: pip install -e '.[lm_eval]'."
        ) from error


def require_tokens(tokenizer: Any, name: str) -> Any:
    """A tokenizer that makes tokens of a text: RULER's functions would never end with another.

    Raises:
        UserError: If it makes none.
    """
    count = len(tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"])
    require(count > 0, "tokenizer", name, "one that makes tokens of a text; this one makes none", "choose another")
    return tokenizer


@contextmanager
def tasks_with(load_tokenizer: Callable[[str], Any]) -> Iterator[None]:
    """While this lasts, all tasks that make documents of a length measure it with tokenizers we load, running no code.

    For whole runs of lm-eval, whose tasks are named on its command line.

    Args:
        load_tokenizer: By the name that lm-eval has: ``tokenizer=``, or else ``pretrained=``.
    """

    def own(name: str | None = None, pretrained: str | None = None, *, tokenizer: str | None = None, **_: Any) -> Any:
        return load_tokenizer(name or tokenizer or pretrained or "")

    def others(names: Names) -> Names:
        if "get_haystack" in names and not splitter_is_there():
            log.info("nltk's punkt_tab cannot be had: sentences of RULER's essays are split by a regular expression")
        return {"get_tokenizer": own} if "get_tokenizer" in names else {}

    with impatient(), documents_made_with(others):
        yield
