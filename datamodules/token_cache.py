"""Documents tokenised once into a memory-mapped file, keyed by content and tokenizer."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from lightning_memlong.errors import UserError
from lightning_memlong.files import cache_dir, make_folder, write_folder
from lightning_memlong.text import tokenise, tokenizer_digest

from .records import Document

log = logging.getLogger("lightning_memlong")

FORMAT = 3
BATCH_CHARACTERS = 4_000_000  # enough for all cores, little enough to hold


class TokenCache:
    """Token ids of many documents, in one memory-mapped file.

    Args:
        folder: What :meth:`build` wrote.
        tokenizer: Digest of the tokenizer that is used, if known.

    Raises:
        UserError: If the folder is damaged, or belongs to another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: str | None = None) -> None:
        self.name = folder.name
        try:
            facts = json.loads((folder / "documents.json").read_text())
            self.ids: list[str] = facts["ids"]
            self.lengths: list[int] = facts["lengths"]
            self.marks: list[str] = facts["marks"]
            self.problems: list[tuple[str, str]] = [(name, why) for name, why in facts["problems"]]
            self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
            size = int(self._starts[-1])
            self._file, self._dtype = folder / "tokens.bin", facts["dtype"]
            self._tokens: Any = self._map() if size else np.zeros(0, np.int32)  # an empty file cannot be mapped
            if len(self._tokens) != size:
                raise ValueError(f"{len(self._tokens):,} tokens of {size:,}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"MEMLONG_CACHE: the token cache {folder} is damaged ({error}). Allowed: what a run wrote. Fix: delete "
                "that folder; it is made again."
            ) from error
        if tokenizer is not None and facts["tokenizer"] != tokenizer:
            raise UserError(
                f"MEMLONG_CACHE: the token cache {folder} was made with another tokenizer. Allowed: the one of "
                "model.backbone. Fix: delete that folder; it is made again."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self) -> np.ndarray:
        return np.memmap(self._file, dtype=self._dtype, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A worker process that is not forked maps the file, instead of being sent its content.
        return {k: v for k, v in vars(self).items() if k != "_tokens" or not isinstance(v, np.memmap)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_tokens" not in state:
            self._tokens = self._map()

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, fewer at its end."""
        first = self._starts[document]
        return self._tokens[first + start : first + min(stop, self.lengths[document])]

    @classmethod
    def build(
        cls,
        name: str,
        source: str,
        documents: Callable[[], Iterable[Document]],
        tokenizer: PreTrainedTokenizerBase,
        control: bool = False,
    ) -> "TokenCache":
        """Open the cache of these documents, tokenising them if that has not been done before.

        The folder's name holds a digest of the source and of the tokenizer, so another text or tokenizer never meets
        an old cache. It is written beside its place and renamed, so that a killed build leaves nothing, and under a
        lock, so that of two processes the second waits for the first.

        Args:
            name: Begins the folder's name.
            source: Whatever identifies the documents' content.
            documents: Gives them; called only if they are needed.
            tokenizer: Turns them into tokens.
            control: Whether what is spelled like a special token becomes one.
        """
        mark = tokenizer_digest(tokenizer)
        key = hashlib.sha256(f"{FORMAT}/{source}/{mark}/{control}".encode()).hexdigest()[:16]
        folder = cache_dir() / "tokens" / f"{name}-{key}"
        if not folder.exists():
            make_folder(folder.parent)
            with _FolderLock(folder):
                if not folder.exists():
                    for left_over in folder.parent.glob(f".{folder.name}-*"):
                        shutil.rmtree(left_over, ignore_errors=True)
                    write_folder(
                        folder, lambda target: _write_cache(target, name, documents(), tokenizer, mark, control)
                    )
                    log.info("Tokens are kept in %s", folder)
        return cls(folder, mark)


class _FolderLock:
    """Hold the lock of a folder; say so when another process has it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, FileLock(folder.with_name(f"{folder.name}.lock"))

    def __enter__(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            log.info("Another process is tokenising the same text; waiting for %s", self.folder.name)
            self.lock.acquire()

    def __exit__(self, *args: object) -> None:
        self.lock.release()


def _batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) == 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_cache(
    target: Path, name: str, documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, mark: str, control: bool
) -> None:
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    facts: dict[str, Any] = {"tokenizer": mark, "dtype": np.dtype(dtype).name, "problems": []}
    facts |= {"ids": [], "lengths": [], "marks": []}
    columns = (SpinnerColumn(), TextColumn(f"Tokenising {name}"), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress, open(target / "tokens.bin", "wb") as file:
        task = progress.add_task("")
        for batch in _batch_documents(documents):
            good = [d for d in batch if d.problem is None]
            facts["problems"] += [(d.id, d.problem) for d in batch if d.problem is not None]
            for document, tokens in zip(good, tokenise(tokenizer, [d.text for d in good], control), strict=True):
                tokens.astype(dtype).tofile(file)
                facts["ids"].append(document.id)
                facts["lengths"].append(len(tokens))
                facts["marks"].append(document.digest())
            total = sum(facts["lengths"])
            speed = total / max(progress.tasks[0].elapsed or 0, 1e-9)
            text = f"{len(facts['ids']):,} documents, {total:,} tokens, {speed:,.0f} tokens/s"
            progress.update(task, description=text)
    (target / "documents.json").write_text(json.dumps(facts))
