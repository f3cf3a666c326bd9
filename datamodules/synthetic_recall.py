"""Documents that ask at their end for what was planted in them; only the answers are scored."""

import hashlib
import itertools
from typing import Any

import numpy as np
import torch

from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.config import require, require_choice
from lightning_memlong.text import Batch
from lightning_memlong.text.planting import KINDS, Probe, filler_tokens, plant

from . import splits
from .cached import CachedStream
from .documents import DocumentDataModule


class SyntheticRecall(DocumentDataModule):
    """Pass keys, pairs of keys and values, and passages, planted at chosen depths; made on the spot, no files needed.

    Args:
        kinds: Of pass_key, key_value and passage.
        lengths: Tokens of the documents [tokens].
        depths: Where things are planted, from 0 (the beginning) to 1 (right before the question).
        samples: Documents of each kind, length and depth, in each split [documents].
        filler: Text file that everything is planted in; null: the sentences of the pass-key task.
        **kwargs: As for every corpus; ``window``, ``stride``, ``batch_size``, ``shuffle`` and ``seed`` have a meaning
            here, what says where text is has none.
    """

    name = "synthetic-recall"
    plants = True

    def __init__(
        self,
        kinds: list[str] = list(KINDS),  # noqa: B006  (shown as the default by --help)
        lengths: list[int] = [1024, 4096],  # noqa: B006  (likewise)
        depths: list[float] = [0.0, 0.25, 0.5, 0.75, 1.0],  # noqa: B006  (likewise)
        samples: int = 4,
        filler: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for option, given in (("kinds", kinds), ("lengths", lengths), ("depths", depths)):
            require(bool(given), f"data.{option}", given, "at least one", "name one, or leave it out")
        for kind in kinds:
            require_choice("data.kinds", kind, KINDS)
        require(samples >= 1, "data.samples", samples, "1 or more", "raise it")
        for depth in depths:
            require(0 <= depth <= 1, "data.depths", depths, "from 0 to 1", "correct it")
        for option, value in (("path", self.path), ("hub_id", kwargs.get("hub_id"))):
            fix = "leave it out; for text to plant in, use --data.filler"
            require(value is None, f"data.{option}", value, "null: these documents are made", fix)
        self.kinds, self.lengths, self.depths, self.samples, self.filler = kinds, lengths, depths, samples, filler

    def setup(self, stage: str) -> None:
        """Make the documents of the splits that the stage needs."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.settings.tokenizer)
        filler = filler_tokens(self.filler, max(self.lengths), self._tokenizer, "data.filler")
        for part in splits.needed(stage):
            if part in self.streams:
                continue
            first = splits.ROLES.index(part) * self.samples  # no split sees another's numbers and words
            samples = range(first, first + self.samples)
            grid = itertools.product(self.kinds, self.lengths, self.depths, samples)
            probes = {
                f"{kind}-{length}-{depth}-{sample}": plant(
                    kind, length, depth, sample, filler, self._tokenizer, "data.lengths"
                )
                for kind, length, depth, sample in grid
            }
            windows, seed = self.settings.windows(self._tokenizer.pad_token_id), self.settings.shuffle_seed(part)
            self.streams[part] = _RecallStream(_PlantedDocuments(probes), range(len(probes)), windows, seed)


class _PlantedDocuments:
    """Documents in memory."""

    def __init__(self, probes: dict[str, Probe]) -> None:
        self.ids, self.probes = list(probes), list(probes.values())
        self.lengths = [len(p.tokens) for p in self.probes]
        content = b"".join(p.tokens.tobytes() for p in self.probes)
        self.name = f"probes-{hashlib.sha256(content).hexdigest()[:16]}"

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, fewer at its end."""
        return self.probes[document].tokens[start:stop]


class _RecallStream(CachedStream):
    """Batches whose labels are the answers alone.

    ``planted`` (R, 2) says where in its document that stands which a window asks for and does not hold
    [tokens]; -1: there is nothing of the kind.
    """

    cache: _PlantedDocuments

    def __getitem__(self, number: int) -> Batch:
        """One batch of the epoch that was begun last."""
        batch = super().__getitem__(number)
        batch["planted"] = torch.full((len(batch["offset"]), 2), -1)
        for row, (document, offset) in enumerate(zip(batch["document_id"], batch["offset"], strict=True)):
            if document >= 0:
                probe = self.cache.probes[int(document)]
                answer = probe.answer - int(offset)
                batch["labels"][row, : max(0, answer)] = -100
                if answer < self.windows.window and probe.planted[0] < int(offset):
                    batch["planted"][row] = torch.tensor(probe.planted)
        return batch
