"""Texts as people give them: strings or token ids, one or several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_memlong.errors import UserError

Text = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray | Mapping[str, Any]
"""One text or several, as strings or token ids."""


def as_tokens(given: Any, tokenise: Callable[[str, int], np.ndarray]) -> list[np.ndarray]:
    """Token ids (T,) of each text.

    Args:
        given: A text; token ids, as a list, a (T,) or (B, T) tensor or array, or what a tokenizer gives
            (``input_ids``, and ``attention_mask``, which takes off padding); or several texts or lists of ids.
        tokenise: Token ids of a text, and its number, for messages.

    Raises:
        UserError: For anything else.
    """
    if isinstance(given, str):
        return [tokenise(given, 0)]
    if isinstance(given, Mapping) and "input_ids" in given:
        rows = [_ids(row, given) for row in _rows(given["input_ids"], given)]
        masks = given.get("attention_mask")
        if masks is None:
            return rows
        kept = [_mask(mask, given) for mask in _rows(masks, given)]
        if [*map(len, kept)] != [*map(len, rows)] or not all(mask.any() for mask in kept):
            raise _not_text(given)
        return [row[mask] for row, mask in zip(rows, kept, strict=True)]
    if isinstance(given, bytes | Mapping) or not isinstance(given, Sequence | Tensor | np.ndarray) or not len(given):
        raise _not_text(given)
    if isinstance(given, Sequence) and all(isinstance(text, str) for text in given):
        return [tokenise(text, row) for row, text in enumerate(given)]
    return [_ids(row, given) for row in _rows(given, given)]


def _rows(ids: Any, given: Any) -> list[Any]:
    """Rows of ids; a single one is one."""
    if isinstance(ids, Tensor | np.ndarray):
        return [ids] if ids.ndim < 2 else list(ids)
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes) or not len(ids):
        raise _not_text(given)
    nested = [isinstance(row, Sequence | Tensor | np.ndarray) and not isinstance(row, str | bytes) for row in ids]
    if any(nested) and not all(nested):
        raise _not_text(given)
    return list(ids) if all(nested) else [ids]


def _ids(row: Any, given: Any) -> np.ndarray:
    found = np.asarray(row.cpu() if isinstance(row, Tensor) else row)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu" or found.min() < 0:
        raise _not_text(given)
    return found.astype(np.int64)


def _mask(row: Any, given: Any) -> np.ndarray:
    found = np.asarray(row.cpu() if isinstance(row, Tensor) else row)
    return found if found.dtype == bool else _ids(found, given) != 0


def _not_text(given: Any) -> UserError:
    what = repr(given) if len(repr(given)) <= 60 else f"{repr(given)[:57]}..."
    return UserError(
        f"text={what} ({type(given).__name__}) cannot be read. Allowed: a text, several texts, or token ids of one or "
        "several (list, tensor, or what a tokenizer gives). Fix: decode bytes (data.decode()), give file.read_text(), "
        "or do not mix texts and ids."
    )
