"""Which documents an evaluation scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_memlong.config import require
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.grid import ScoredDocument

Corpora = Mapping[str, str | dict[str, Any]] | None
"""Name -> a path, or options of the data group that differ; None: the text of the data group alone."""


def check_corpora(corpora: Corpora) -> None:
    """See that there is at least one corpus, and that each has a name.

    Raises:
        UserError: If not.
    """
    ok = corpora is None or (bool(corpora) and all(isinstance(n, str) for n in corpora))
    allowed = "null, or at least one, each under a name that is text"
    require(ok, "evaluation.corpora", corpora, allowed, "name one, in quotes where YAML reads no or on")


def find_documents(
    subject: Subject, corpora: Corpora, count: int, least: int, key: str, value: object
) -> list[ScoredDocument]:
    """Of each corpus the first documents that are long enough.

    Args:
        subject: Who has the text.
        corpora: Which.
        count: Most documents of a corpus.
        least: Tokens each must have.
        key: The setting that says so, for messages.
        value: Its value.

    Raises:
        UserError: If a corpus has none.
    """
    if corpora is None:
        opened = {subject.data.text_name: subject.data}
    else:
        opened = {name: subject.open_data(name, options) for name, options in corpora.items()}
    return [d for name, data in opened.items() for d in _long_enough(name, data, count, least, key, value)]


def _long_enough(corpus: str, data: Any, count: int, least: int, key: str, value: object) -> list[ScoredDocument]:
    found: list[ScoredDocument] = []
    longest = 0
    for name, tokens in data.whole_documents("test"):
        longest = max(longest, len(tokens))
        if len(tokens) >= least:
            found.append(ScoredDocument(corpus, name, np.asarray(tokens)))
        if len(found) == count:
            break
    fix = f"lower it, or read longer documents; the longest of {corpus} has {longest} tokens"
    require(bool(found), key, value, f"at most {longest} tokens for {corpus}", fix)
    return found
