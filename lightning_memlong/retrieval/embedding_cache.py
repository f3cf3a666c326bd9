"""Embeddings kept on disk: they depend on no tuned weight, so no chunk need be encoded twice."""

import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.errors import UserError
from lightning_memlong.files import make_folder
from lightning_memlong.retrieval.chunks import Chunks

log = logging.getLogger(__name__)

WAIT_S = 60.0


class CachedRetriever:
    """A retriever that looks up what it has encoded before, in this run or any other.

    The file is an SQLite database: several processes may read and write it at once, and a killed one leaves it whole.

    Args:
        retriever: Encodes what is not there.
        path: The database; its name must say which retriever it belongs to.

    Raises:
        UserError: If the file cannot be read or written.
    """

    def __init__(self, retriever: Any, path: Path) -> None:
        self.retriever, self.path, self.size = retriever, path, retriever.size
        self.hits = self.misses = 0
        make_folder(path.parent)
        self._owner = -1
        self._database: sqlite3.Connection | None = None
        self._connect()
        log.info("Embeddings are kept in %s", path)

    def to(self, device: torch.device) -> "CachedRetriever":
        """Move the encoder."""
        self.retriever.to(device)
        return self

    def as_query(self, asking: Tensor, candidates: Callable[[], Tensor]) -> Tensor:
        """See :class:`lightning_memlong.retrieval.retriever.Retriever`."""
        return self.retriever.as_query(asking, candidates)

    needs_hidden = False

    def embed(self, chunks: Chunks) -> Tensor:
        """Unit vectors (m, size) of chunks, by their texts."""
        return self.encode(chunks.texts)

    def encode(self, texts: list[str]) -> Tensor:
        """Unit vectors (n, size), float32, on the CPU."""
        keys = [hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest() for text in texts]
        known = self._look_up(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        self.hits += len(texts) - len(missing)
        self.misses += len(missing)
        if missing:
            vectors = self.retriever.encode(list(missing.values())).numpy().astype("<f4")
            new = {key: vector.tobytes() for key, vector in zip(missing, vectors, strict=True)}
            self._keep(new)
            known |= new
        return torch.from_numpy(np.stack([np.frombuffer(known[key], "<f4") for key in keys]).astype(np.float32))

    def _look_up(self, keys: list[bytes]) -> dict[bytes, bytes]:
        marks = ",".join("?" * len(keys))
        rows = self._run(f"SELECT key, vector FROM embeddings WHERE key IN ({marks})", keys)
        return {key: vector for key, vector in rows if len(vector) == 4 * self.size}

    def _keep(self, new: dict[bytes, bytes]) -> None:
        # Two processes may have encoded the same text; the first to say so is right.
        self._run("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", list(new.items()), many=True)

    def _run(self, statement: str, values: list[Any], many: bool = False) -> list[tuple[bytes, bytes]]:
        try:
            database = self._connect()
            with database:
                if many:
                    database.executemany(statement, values)
                    return []
                return database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _connect(self) -> sqlite3.Connection:
        if self._database is None or self._owner != os.getpid():  # a connection must not cross a fork
            try:
                # Threads may share it: SQLite takes one statement at a time, and each of ours stands by itself.
                self._database = sqlite3.connect(self.path, timeout=WAIT_S, check_same_thread=False)
                self._owner = os.getpid()
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=NORMAL")
                self._database.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB)")
            except sqlite3.Error as error:
                raise self._told(error) from error
        return self._database

    def _told(self, error: sqlite3.Error) -> UserError:
        return UserError(
            f"memory.retriever.cache: {self.path} cannot be used ({error}). Allowed: a whole file in a writable folder "
            "with free space. Fix: delete the file if it is damaged, set MEMLONG_CACHE to another folder, or "
            "--memory.retriever.cache false."
        )
