"""Document streams: every batch row reads one document from start to end, window by window.

A batch is ``{"input_ids": (B, T), "labels": (B, T), "length": (B,), "document_start": (B,), "document_id": (B,),
"offset": (B,), "overlap": (B,)}``. Row b continues row b of the batch before it until its document ends; a window
never holds two documents; the short last window of a document is padded on the right and masked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np

from datamodules import splits
from datamodules.cached import CachedStream
from datamodules.hub import Hub
from datamodules.open_split import Stream, is_bad, open_split
from datamodules.records import Columns, Row, Shard
from datamodules.resolve_source import locate
from datamodules.splits import ROLES, Split
from datamodules.streaming import LiveStream
from datamodules.token_cache import Document
from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.config import require, require_choice
from lightning_memlong.distributed import gather, rank_and_world
from lightning_memlong.errors import UserError

OnBad = Literal["raise", "skip"]
Paths = str | list[str]


class DocumentDataModule(L.LightningDataModule):
    """What every corpus shares: sources, splits, windows, tokens, batches and exact resume.

    A corpus says where it is on the hub (``hub``) and what its documents are (:meth:`documents`).

    Args:
        tokenizer: Backbone whose tokenizer is used (set by ``model.backbone``).
        chunk_size: Tokens of a bank entry (set by ``memory.chunk_size``).
        path: A file, folder, glob or http:// address (.txt, .jsonl, .parquet; .gz and .zst of the first two); or a
            list of these; or one or a list for each split, as {train: ..., validation: ...}; null: the hub.
        extensions: Endings of files that are read from a folder; null: the corpus's own.
        hub_id: Data set of the Hugging Face hub, streamed; null: the corpus's own.
        hub_config: Its configuration; null: the corpus's own.
        hub_revision: Its branch, tag or commit; null: the newest.
        hub_files: Of each split, a glob of files in the repository, for one that only loads through a script.
        text_column: Column of the text, where rows have columns; null: the corpus's own.
        train_split: What the source calls its training split.
        validation_split: What the source calls its validation split.
        test_split: What the source calls its test split.
        split: ``folders``: files or top folders named after the splits, or the hub's own splits; ``hash``: by a stable
            hash of documents' names; ``all``: every document in validation and test (evaluation only); ``auto``:
            the source's own if it has train and another one, else the hash.
        validation_fraction: Share of documents the hash gives to validation, and the same again to test.
        window: Tokens a step sees [tokens]. Paper, section 3: 1,024.
        stride: Tokens a step advances and is scored on [tokens]; null: the window (disjoint windows, the paper).
        batch_size: Documents read side by side, in each process [rows].
        min_document_tokens: Shorter documents are left out, and counted [tokens]; null: none, and one shorter than a
            chunk is a bad document.
        max_document_tokens: Longer documents are read up to here [tokens]; null: whole.
        shuffle: Mix the order of training documents anew each epoch.
        shuffle_buffer: Documents that are mixed at a time while streaming [documents]; from the cache, all are.
        cache: Tokenise everything before the first step, into a memory-mapped file that later runs find; false:
            while training; null: true for files that have no splits of their own, and for LocalText.
        num_workers: Processes that tokenise (or read the cache) ahead of the model; the order of batches does not
            depend on it. null: 2 while streaming, none from the cache.
        on_bad_document: ``raise`` stops at text that cannot be read or used; ``skip`` leaves it out and counts it.
        retries: How often a network fault is followed by another try, waiting twice as long each time.
        seed: Seed of the order of documents (set by ``seed_everything``).
    """

    name = "documents"
    hub: Hub | None = None
    columns = Columns("text")
    endings: tuple[str, ...] = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt.gz", ".txt.zst")
    empty_is_bad = True
    """Whether a document without text is a bad one; else it is a short one."""
    lines_are_rows = False
    """Whether the lines of a plain text file are rows; else the file is one."""
    cache_by_default = False

    def __init__(
        self,
        tokenizer: str = "smollm2-135m",
        chunk_size: int = 128,
        path: dict[str, Paths] | list[str] | str | None = None,
        extensions: list[str] | None = None,
        hub_id: str | None = None,
        hub_config: str | None = None,
        hub_revision: str | None = None,
        hub_files: dict[str, str] | None = None,
        text_column: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        split: Split = "auto",
        validation_fraction: float = 0.05,
        window: int = 512,
        stride: int | None = None,
        batch_size: int = 1,
        min_document_tokens: int | None = None,
        max_document_tokens: int | None = None,
        shuffle: bool = True,
        shuffle_buffer: int = 64,
        cache: bool | None = None,
        num_workers: int | None = None,
        on_bad_document: OnBad = "raise",
        retries: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.stride = window if stride is None else stride
        self.tokenizer_name, self.chunk_size, self.window, self.batch_size = tokenizer, chunk_size, window, batch_size
        self.path, self.extensions = path, tuple(extensions or self.endings)
        self.source_splits = dict(zip(ROLES, (train_split, validation_split, test_split), strict=True))
        self.how, self.validation_fraction = split, validation_fraction
        self.min_document_tokens, self.max_document_tokens = min_document_tokens, max_document_tokens
        self.shuffle, self.shuffle_buffer, self.seed = shuffle, shuffle_buffer, seed
        self.cache, self.num_workers, self.on_bad_document, self.retries = cache, num_workers, on_bad_document, retries
        if text_column:
            self.columns = replace(self.columns, text=text_column)
        # Another data set's configuration and files are not this corpus's.
        own = self.hub if self.hub is not None and hub_id in (None, self.hub.id) else Hub(hub_id or "")
        self.hub_source = Hub(own.id, hub_config or own.config, hub_revision, hub_files or own.files)
        self._check()
        self._streams: dict[str, Stream] = {}
        self._resume: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._tokenizer: Any = None
        self._located: Any = None

    def _check(self) -> None:
        chunk, window, least = self.chunk_size, self.window, self.min_document_tokens
        fits = f"a multiple of memory.chunk_size={chunk}"
        require(window >= 1 and window % chunk == 0, "data.window", window, fits, "change one of the two")
        ok = 0 < self.stride <= window and self.stride % chunk == 0
        at_most = f"{fits}, at most data.window={window}"
        require(ok, "data.stride", self.stride, at_most, "leave it out for disjoint windows")
        for key, smallest in (("batch_size", 1), ("shuffle_buffer", 1), ("num_workers", 0), ("retries", 0)):
            value = getattr(self, key)
            require(value is None or value >= smallest, f"data.{key}", value, f"{smallest} or more", "raise it")
        longest = self.max_document_tokens
        allowed = f"null, or at least data.min_document_tokens={least}"
        ok = longest is None or longest >= max(2, least or 0)
        fix = "raise it, or lower --data.min_document_tokens"
        require(ok, "data.max_document_tokens", longest, allowed, fix)
        require_choice("data.split", self.how, Split)
        require_choice("data.on_bad_document", self.on_bad_document, OnBad)
        ok, fix = 0 < self.validation_fraction < 0.5, "for all documents use --data.split all"
        require(ok, "data.validation_fraction", self.validation_fraction, "above 0 and below 0.5", fix)

    # ---- what a corpus says -------------------------------------------------------------------------------

    def default_path(self) -> str | None:
        """Where the text is if neither ``path`` nor ``hub_id`` is given; None: on the hub."""
        return None

    def wanted(self, file: str) -> bool:
        """Whether a file of a folder belongs to the corpus, by its path relative to it."""
        return True

    def documents(self, shards: Sequence[Shard], index: int, start: int = 0) -> Iterator[Document]:
        """Documents that begin in a shard, from the one at row ``start`` on: here, one a row or a text file."""
        for row in shards[index].rows(start):
            yield self.document(shards, index, row)

    def document(
        self, shards: Sequence[Shard], index: int, row: Row, text: str | None = None, problem: str | None = None
    ) -> Document:
        """A document that begins at a row; its text is the row's own, or that of several rows."""
        shard, content = shards[index], row.text if text is None else text
        whole = getattr(shard, "is_text", False) and text is None
        problem = problem or row.problem or ("it is empty" if self.empty_is_bad and not content.strip() else None)
        return Document(
            shard.name if whole else f"{shard.name}:{row.number + 1}", content, (index, row.number), problem
        )

    def recipe(self) -> tuple[Any, ...]:
        """What beside the files makes the documents."""
        return type(self).__name__, self.columns, self.empty_is_bad

    # ---- setting up ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Find the source and open the splits the stage needs, tokenising now if they are cached.

        Raises:
            UserError: If there is no such source or split, or a document of it cannot be used.
        """
        if self._located is None:
            self._tokenizer, self._located = load_tokenizer(self.tokenizer_name), locate(self)
        for part in splits.needed(stage):
            if part not in self._streams:
                self._streams.update(open_split(self, self._located, self._tokenizer, part, stage))

    # ---- batches ------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Stream:
        """Batches, an epoch at each iteration; after a resume, from the first that was not trained on."""
        if self._resume is not None:
            self._streams["train"].resume(self._resume)
            self._resume = None
        return self._streams["train"]

    def val_dataloader(self) -> Stream:
        """Validation batches, always in the same order."""
        return self._streams["validation"]

    def test_dataloader(self) -> Stream:
        """Test batches, always in the same order."""
        return self._streams["test"]

    @property
    def text_name(self) -> str:
        """What is read, for titles: the corpus, and the file or folder where there is one."""
        return f"{self.name} {Path(self.path).name}" if isinstance(self.path, str) else self.name

    def document_name(self, part: str, document_id: int) -> str:
        """Which document of a split a ``document_id`` means: its file, and the row in it if files have rows."""
        return self._streams[part].name_of(document_id)

    def whole_documents(self, part: str) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tokens (T,) of each document of a split, one after the other."""
        return self._streams[part].whole_documents()

    def texts(self) -> Iterator[tuple[str, str]]:
        """Name and text of each document of the source, whole, of any split and length.

        Raises:
            UserError: If there is no such source, or a document of it cannot be used.
        """
        found = self._located = self._located or locate(self)
        for shards in found.shards.values():
            for index in range(len(shards)):
                for document in self.documents(shards, index):
                    if not is_bad(self, found, document, self.chunk_size) and document.text.strip():
                        yield document.id, document.text

    def longest_document(self, stage: str) -> int | None:
        """The most tokens a document of a stage can have; None: not known before it has been read."""
        lengths = [self._streams[part].longest_document() for part in splits.needed(stage) if part in self._streams]
        return None if None in lengths else max(lengths, default=0)  # type: ignore[type-var]

    def teardown(self, stage: str) -> None:
        """Say what was left out, in each process of its own documents."""
        rank, world = rank_and_world()
        of = f" (process {rank + 1} of {world})" if world > 1 else ""
        for part in splits.needed(stage):
            if part in self._streams and (words := self._streams[part].left_out()):
                print(f"Data: {self.name}, {part}{of}: {words}", flush=True)

    # ---- resuming -----------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"cache": isinstance(self._streams["train"], CachedStream)}
        facts |= {k: getattr(self, k) for k in ("window", "stride", "batch_size", "seed", "shuffle")}
        if isinstance(self._streams["train"], LiveStream):
            facts |= {k: getattr(self, k) for k in ("shuffle_buffer", "min_document_tokens", "max_document_tokens")}
        return facts

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data of every process: the first batch that was not trained on.

        Epochs are the stream's own: Lightning's count is one ahead after resuming at the last batch of an epoch.
        """
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        stream = self._streams["train"]
        finished = progress.is_last_batch and progress.current.processed == progress.current.ready
        place = (stream.epoch + 1, 0) if finished else (stream.epoch, progress.current.processed)
        return {"positions": gather(stream.position(*place)), "text": stream.digest(), **self._facts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position when training goes on; an evaluation begins at the beginning.

        Raises:
            UserError: If the order of batches would not be the one of the saved run.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        fix = "go on with that value, or start a new run"
        for key, value in self._facts().items():
            saved = state.get(key, value)
            require(saved == value, f"data.{key}", value, f"{saved}, which the checkpoint was made with", fix)
        if state["text"] != self._streams["train"].digest():
            raise UserError(
                "data: the training text is not the one of the checkpoint (the files, data.path, hub_*, extensions, "
                "*_column, run_characters, split, *_split, validation_fraction, min_document_tokens and "
                "max_document_tokens make it). Allowed: the same text. Fix: give these options as they were, or start "
                "a new run without --ckpt_path."
            )
        rank, world = rank_and_world()
        saved = len(state["positions"])
        require(saved == world, "trainer.devices", world, f"{saved}, which the checkpoint was made with", fix)
        self._resume = self._resumed = state["positions"][rank]

    def begun(self) -> list[list[np.ndarray]]:
        """Of each row, the windows that were read, before a resume, of the document it is in the middle of."""
        assert self._resumed is not None
        return self._streams["train"].begun(self._resumed)
