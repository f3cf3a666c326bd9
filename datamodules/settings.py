"""The options of a DataModule as one value: checked once, never changed, and read by everything below it."""

from dataclasses import dataclass
from typing import Literal

from lightning_memlong.config import require, require_choice, require_types
from lightning_memlong.text import Windows

from .hub import Hub
from .splits import Split

OnBad = Literal["raise", "skip"]
Paths = str | list[str]


@dataclass(frozen=True)
class DataSettings:
    """What :class:`datamodules.documents.DocumentDataModule` was given; its docstring says what each option means.

    Raises:
        UserError: If one is out of its range, or two do not go together.
    """

    tokenizer: str
    chunk_size: int
    path: dict[str, Paths] | list[str] | str | None
    extensions: tuple[str, ...]
    """Endings of files that are read: those that were asked for, else the corpus's own."""
    hub: Hub
    """The data set that is streamed where there is no path; without an id: none."""
    split_names: dict[str, str]
    """What the source calls train, validation and test."""
    split: Split
    validation_fraction: float
    window: int
    stride: int
    batch_size: int
    min_document_tokens: int | None
    max_document_tokens: int | None
    shuffle: bool
    shuffle_buffer: int
    cache: bool | None
    num_workers: int | None
    on_bad_document: OnBad
    retries: int
    timeout_s: float
    control_tokens: bool
    seed: int

    def __post_init__(self) -> None:
        """Check windows, numbers and choices, in the order in which a user meets them."""
        require_types(self, "data")
        self._check_path()
        self._check_windows()
        for key, smallest in (("batch_size", 1), ("shuffle_buffer", 1), ("num_workers", 0), ("retries", 0)):
            value = getattr(self, key)
            require(value is None or value >= smallest, f"data.{key}", value, f"{smallest} or more", "raise it")
        self._check_longest()
        require(self.timeout_s > 0, "data.timeout_s", self.timeout_s, "above 0", "raise it")
        require_choice("data.split", self.split, Split)
        require_choice("data.on_bad_document", self.on_bad_document, OnBad)
        ok, fix = 0 < self.validation_fraction < 0.5, "for all documents use --data.split all"
        require(ok, "data.validation_fraction", self.validation_fraction, "above 0 and below 0.5", fix)

    def _check_path(self) -> None:
        given = self.path.values() if isinstance(self.path, dict) else [self.path]
        flat = [one for some in given for one in (some if isinstance(some, list) else [some])]
        allowed = "null, a path, or at least one path in a list or for a split"
        ok = bool(flat) and all(one is None or one.strip() for one in flat) and (self.path is None or flat != [None])
        require(ok, "data.path", self.path, allowed, "name a file or folder; for the present folder, .")

    def _check_windows(self) -> None:
        chunk, window = self.chunk_size, self.window
        require(chunk >= 1, "memory.chunk_size", chunk, "1 or more tokens", "raise it")
        fits = f"a multiple of memory.chunk_size={chunk}"
        require(window >= 1 and window % chunk == 0, "data.window", window, fits, "change one of the two")
        ok = 0 < self.stride <= window and self.stride % chunk == 0
        at_most = f"{fits}, at most data.window={window}"
        require(ok, "data.stride", self.stride, at_most, "leave it out for disjoint windows")

    def _check_longest(self) -> None:
        least, longest = self.min_document_tokens, self.max_document_tokens
        ok, fix = least is None or least >= 1, "raise it, or leave it out for none"
        require(ok, "data.min_document_tokens", least, "null, or 1 or more tokens", fix)
        allowed = f"null, or at least data.min_document_tokens={least}"
        ok = longest is None or longest >= max(2, least or 0)
        fix = "raise it, or lower --data.min_document_tokens"
        require(ok, "data.max_document_tokens", longest, allowed, fix)

    @property
    def shortest(self) -> int:
        """Documents with fewer tokens are left out: of one token none can be predicted [tokens]."""
        return max(2, self.min_document_tokens or 0)

    def shuffle_seed(self, part: str) -> int | None:
        """The seed that mixes a split's documents; None: they keep their order."""
        return self.seed if part == "train" and self.shuffle else None

    def windows(self, pad: int | None) -> Windows:
        """How documents are cut and batched, padded with a token id (of a tokenizer that may have none)."""
        return Windows(self.window, self.stride, self.batch_size, pad or 0)


def choose_hub(
    own: Hub | None, hub_id: str | None, config: str | None, revision: str | None, files: dict[str, str] | None
) -> Hub:
    """The data set that options name: the corpus's own, or another, whose configuration and files are not its."""
    base = own if own is not None and hub_id in (None, own.id) else Hub(hub_id or "")
    return Hub(base.id, config or base.config, revision, files or base.files)
