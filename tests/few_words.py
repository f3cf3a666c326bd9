"""lm-eval's module of needles with a few words: all six million pairs of them take ten seconds and a gigabyte."""

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import wonderwords

from lightning_memlong.lm_eval.lm_eval_private import NEEDLES, impatient


def import_few_words() -> ModuleType:
    """The module, as it is if it was imported before."""
    if NEEDLES in sys.modules:
        return sys.modules[NEEDLES]
    made = wonderwords.RandomWord

    def few(*args: Any, **kwargs: Any) -> Any:
        found = made(*args, **kwargs)
        found._categories = {name: list(words)[:60] for name, words in found._categories.items()}
        return found

    with patch.object(wonderwords, "RandomWord", few), impatient():
        return importlib.import_module(NEEDLES)
