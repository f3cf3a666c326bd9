"""How retrieval changes from window to window, and whether it finds what was planted."""

from collections.abc import Mapping
from typing import Any

from lightning_memlong.bank import Retrieved


class RetrievalStatistics:
    """Fed window by window, in the order of training."""

    def __init__(self) -> None:
        self.overlaps: list[float] = []
        """Shares of what windows retrieved that the window before, of the same document, retrieved too."""
        self.hits: list[float] = []
        """1 where what a window asks for was among what it retrieved, else 0; for windows that ask."""
        self._before: dict[int, tuple[int, set[int]]] = {}  # row -> its document, and what it retrieved last

    def add(self, batch: Mapping[str, Any]) -> None:
        """Note a batch of windows."""
        memory: Retrieved | None = batch.get("memory")
        rows = len(batch["document_id"])
        groups = 1 if memory is None else len(memory.positions) // rows
        for row, document in enumerate(batch["document_id"].tolist()):
            places = [] if memory is None else memory.positions[row * groups : (row + 1) * groups].flatten().tolist()
            found = {place for place in places if place >= 0}
            earlier, last = self._before.get(row, (document, set()))
            if found and last and earlier == document:
                self.overlaps.append(len(found & last) / len(found))
            self._before[row] = (document, found)
            start, stop = batch["planted"][row].tolist() if "planted" in batch else (-1, -1)
            if start >= 0 and memory is not None:
                self.hits.append(float(any(p < stop and start < p + memory.chunk_size for p in found)))

    def take(self) -> dict[str, float]:
        """Means since they were last taken, of what there was."""
        values = {"overlap": self.overlaps, "hit_rate": self.hits}
        self.overlaps, self.hits = [], []
        return {name: sum(found) / len(found) for name, found in values.items() if found}
