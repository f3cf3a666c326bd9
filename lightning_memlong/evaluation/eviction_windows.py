"""Windows of one document, scored with what several banks gave for them."""

from typing import Any

import numpy as np

from lightning_memlong.bank import Retrieved
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.scoring import ScoredSpans, score_windows, window_batch


class WindowsOfOne:
    """Scores windows of one document; those that found the same chunks are one pass.

    Args:
        subject: Whose model.
        tokens: (T,) of the document.
        document: Its number.
        with_model: Whether there is anything to score.
    """

    def __init__(self, subject: Subject, tokens: np.ndarray, document: int, with_model: bool) -> None:
        self.subject, self.tokens, self.document, self._with_model = subject, tokens, document, with_model
        window, stride = subject.data.window, subject.data.stride
        # The first token of a window has nothing to be predicted from.
        self._window, self._scored = window, stride - int(stride == window)
        self._known: dict[str, float] = {}

    def batch(self, end: int) -> dict[str, Any]:
        """The window that ends at a place."""
        spans = ScoredSpans((end,), self._window, self._scored, end)
        return window_batch(self.subject, [self.tokens], spans, [self.document])

    def score(self, end: int, memory: Retrieved | None) -> Measurement:
        """Loss of the last tokens before a place."""
        if not self._with_model:
            return {}
        key = f"{end} {None if memory is None else memory.positions.tolist()}"
        if key not in self._known:
            losses, _ = score_windows(self.subject, self.batch(end), memory)
            self._known[key] = float(losses.double().sum())
        return {"nll": self._known[key], "tokens": self._scored}
