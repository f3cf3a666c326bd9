"""Document streams: every batch row reads one document from start to end, window by window.

A batch is ``{"input_ids": (B, T), "labels": (B, T), "length": (B,), "document_start": (B,), "document_id": (B,),
"offset": (B,), "overlap": (B,)}``. Record b continues row b of the batch before it until its document ends; a window
never holds two documents; the short last window of a document is padded on the right and masked.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.distributed import gather, rank_and_world
from lightning_memlong.text import ON_DEVICE

from . import splits
from .corpus import Corpus
from .formats import as_endings
from .hub import Hub
from .open_split import Stream, is_bad, open_split
from .resolve_source import Source, resolve_source
from .resume import order_facts, saved_position
from .same_text import find_held_out, keep_apart, tell_equal_texts
from .settings import DataSettings, OnBad, Paths, choose_hub
from .splits import ROLES, Split


class DocumentDataModule(Corpus, L.LightningDataModule):
    """What every corpus shares: sources, splits, windows, tokens, batches and exact resume.

    A corpus says where it is on the hub (``hub``) and what its documents are (``documents``): see
    :class:`~datamodules.corpus.Corpus`.

    Args:
        tokenizer: Backbone whose tokenizer is used (set by ``model.backbone``).
        chunk_size: Tokens of a bank entry (set by ``memory.chunk_size``).
        path: A file, folder, glob or http:// address (.txt, .jsonl, .csv, .parquet; .gz, .zst, .xz, .bz2 of these); or
            a list of these; or one or a list for each split, as {train: ..., validation: ...}; null: the hub.
        extensions: Endings of files that are read from a folder; null: the corpus's own.
        hub_id: Data set of the Hugging Face hub, streamed; null: the corpus's own.
        hub_config: Its configuration; null: the corpus's own.
        hub_revision: Its branch, tag or commit; null: the newest.
        hub_files: Of each split, a glob of files in the repository, for one that only loads through a script.
        text_column: Column of the text, where rows have columns; null: the corpus's own.
        train_split: What the source calls its training split.
        validation_split: What the source calls its validation split.
        test_split: What the source calls its test split.
        split: ``folders``: folders and files named after the splits, at one level of folders, or the hub's own splits;
            ``hash``: by a stable hash of documents' texts; ``all``: every document in validation and test (evaluation
            only); ``auto``: the source's own if it has two of them, else the hash.
        validation_fraction: Share of documents the hash gives to validation, and the same again to test [share].
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
            depend on it [processes]; null: 2 while streaming, none from the cache.
        on_bad_document: ``raise`` stops at text that cannot be read or used; ``skip`` leaves it out and counts it.
        retries: How often a network fault is followed by another try, waiting twice as long each time [tries].
        timeout_s: How long the server of an http:// address may take to answer, each time [s].
        control_tokens: What a document spells like a special token of the tokenizer (``<|endoftext|>``) becomes that
            token; false: it is text like any other.
        seed: Seed of the order of documents (set by ``seed_everything``).
    """

    name = Corpus.name  # and not Lightning's

    _source: Source | None = None
    _tokenizer: Any = None
    _resume: dict[str, Any] | None = None
    _resumed: dict[str, Any] | None = None

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
        timeout_s: float = 60.0,
        control_tokens: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = DataSettings(
            tokenizer=tokenizer, chunk_size=chunk_size, path=path, extensions=as_endings(extensions or self.endings),
            hub=choose_hub(self.hub, hub_id, hub_config, hub_revision, hub_files),
            split_names=dict(zip(ROLES, (train_split, validation_split, test_split), strict=True)), split=split,
            validation_fraction=validation_fraction, window=window, stride=window if stride is None else stride,
            batch_size=batch_size, min_document_tokens=min_document_tokens, max_document_tokens=max_document_tokens,
            shuffle=shuffle, shuffle_buffer=shuffle_buffer, cache=cache, num_workers=num_workers, seed=seed,
            on_bad_document=on_bad_document, retries=retries, timeout_s=timeout_s, control_tokens=control_tokens,
        )  # fmt: skip
        if text_column:
            self.columns = replace(self.columns, text=text_column)
        self.streams: dict[str, Stream] = {}
        """Of each split that was opened, its batches."""

    # ---- options that others ask for ----------------------------------------------------------------------

    @property
    def path(self) -> dict[str, Paths] | list[str] | str | None:
        """Where text was asked for from."""
        return self.settings.path

    @property
    def hub_source(self) -> Hub:
        """The data set that is streamed if there is no path."""
        return self.settings.hub

    @property
    def chunk_size(self) -> int:
        """Tokens of a bank entry [tokens]."""
        return self.settings.chunk_size

    @property
    def window(self) -> int:
        """Tokens a step sees [tokens]."""
        return self.settings.window

    @property
    def stride(self) -> int:
        """Tokens a step advances and is scored on [tokens]."""
        return self.settings.stride

    @property
    def batch_size(self) -> int:
        """Documents read side by side [rows]."""
        return self.settings.batch_size

    @property
    def seed(self) -> int:
        """Seed of the order of documents."""
        return self.settings.seed

    # ---- setting up ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Find the source and open the splits the stage needs, tokenising now if they are cached.

        Raises:
            UserError: If there is no such source or split, or a document of it cannot be used.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.settings.tokenizer)
        source = self._find_source()
        for part in splits.needed(stage):
            source.shards_of(part, self.settings.split)  # a split that is missing is told before any is tokenised
        new = [part for part in splits.needed(stage) if part not in self.streams]
        if "train" in new and not source.undivided:
            source.held_out = find_held_out(self, source.shards, isinstance(self.path, dict))
        for part in new:
            if part not in self.streams:  # one division opens them all
                self.streams.update(open_split(self.settings, self, source, self._tokenizer, part, stage))
        opened = {part: self.streams[part] for part in splits.needed(stage)}
        if "train" in new and source.held_out is not None:
            keep_apart(opened, source.held_out)
        if new:
            tell_equal_texts(opened)

    def _find_source(self) -> Source:
        if self._source is None:
            self._source = resolve_source(self.settings, self)
        return self._source

    # ---- batches ------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Stream:
        """Batches, an epoch at each iteration; after a resume, from the first that was not trained on."""
        if self._resume is not None:
            self.streams["train"].resume(self._resume)
            self._resume = None
        return self.streams["train"]

    def val_dataloader(self) -> Stream:
        """Validation batches, always in the same order."""
        return self.streams["validation"]

    def test_dataloader(self) -> Stream:
        """Test batches, always in the same order."""
        return self.streams["test"]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move what the network reads; the facts of a window stay on the host, where they are used.

        Args:
            batch: A :class:`~lightning_memlong.text.windows.WindowBatch`, which is left as it is.
            device: Where the network is.
            dataloader_idx: Lightning's number of the dataloader.
        """
        read = {name: batch[name] for name in ON_DEVICE if name in batch}
        batch = {**batch, "tokens": batch["input_ids"]} if "input_ids" in batch else batch
        return {**batch, **super().transfer_batch_to_device(read, device, dataloader_idx)}

    # ---- what was read ------------------------------------------------------------------------------------

    @property
    def text_name(self) -> str:
        """What is read, for titles: the corpus, and the file or folder where there is one."""
        return f"{self.name} {Path(self.path).name}" if isinstance(self.path, str) else self.name

    def document_name(self, part: str, document_id: int) -> str:
        """Which document of a split a ``document_id`` means: its file, and the row in it if files have rows."""
        return self.streams[part].name_of(document_id)

    def whole_documents(self, part: str) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tokens (T,) of each document of a split, one after the other."""
        return self.streams[part].whole_documents()

    def texts(self) -> Iterator[tuple[str, str]]:
        """Name and text of each document of the source, whole, of any split and length.

        Raises:
            UserError: If there is no such source, or a document of it cannot be used.
        """
        source, read = self._find_source(), set[str]()
        for shards in source.shards.values():
            before, addresses = set(read), [getattr(shard, "url", "") for shard in shards]
            read.update(addresses)
            for index, address in enumerate(addresses):
                documents = () if address and address in before else self.documents(shards, index)  # splits may be one
                for document in documents:
                    if not is_bad(self.settings, source, document, self.chunk_size) and document.text.strip():
                        yield document.id, document.text

    def longest_document(self, stage: str) -> int | None:
        """The most tokens a document of a stage can have; None: not known before it has been read."""
        lengths = [self.streams[part].longest_document() for part in splits.needed(stage) if part in self.streams]
        return None if None in lengths else max(lengths, default=0)  # type: ignore[type-var]

    def teardown(self, stage: str) -> None:
        """Say what was read while streaming, and what was left out, in each process of its own documents."""
        rank, world = rank_and_world()
        of = f" (process {rank + 1} of {world})" if world > 1 else ""
        for part in splits.needed(stage):
            stream = self.streams.get(part)
            for words in (stream.was_read(), stream.left_out()) if stream is not None else ():
                if words:
                    print(f"Data: {self.name}, {part}{of}: {words}", flush=True)

    # ---- resuming -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data of every process: the first batch that was not trained on.

        Epochs are the stream's own: Lightning's count is one ahead after resuming at the last batch of an epoch.
        """
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        stream = self.streams["train"]
        finished = progress.is_last_batch and progress.current.processed == progress.current.ready
        place = (stream.epoch + 1, 0) if finished else (stream.epoch, progress.current.processed)
        return {"positions": gather(stream.position(*place)), "text": stream.digest(),
                **order_facts(self.settings, stream)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position when training goes on; an evaluation begins at the beginning.

        Raises:
            UserError: If the order of batches would not be the one of the saved run.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        self._resume = self._resumed = saved_position(state, self.settings, self.streams["train"])

    def replay_windows(self) -> list[list[np.ndarray]]:
        """Of each row, the windows that were read, before a resume, of the document it is in the middle of."""
        assert self._resumed is not None
        return self.streams["train"].replay_windows(self._resumed)
