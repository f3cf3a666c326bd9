"""Documents tokenised once into a memory-mapped file, keyed by content and tokenizer."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from lightning_memlong.backbones import cache_dir, write_folder

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Document:
    """A text that has not been read into tokens yet."""

    id: str
    """Stable name, such as a path relative to the corpus folder."""
    text: str


class TokenCache:
    """Token ids of many documents, in one memory-mapped file.

    Args:
        folder: What :meth:`build` wrote.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "documents.json").read_text())
        self.ids: list[str] = facts["ids"]
        self.lengths: list[int] = facts["lengths"]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.name = folder.name
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, fewer at its end."""
        first = self._starts[document]
        return self._tokens[first + start : first + min(stop, self.lengths[document])]

    @classmethod
    def build(cls, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, name: str) -> "TokenCache":
        """Open the cache of these documents, tokenising them if that has not been done before.

        The folder's name holds a digest of every text and of the tokenizer, so another text or tokenizer never
        meets an old cache. It is written beside its place and renamed, so that a killed build leaves nothing.
        """
        folder = cache_dir() / "tokens" / f"{name}-{_digest(documents, tokenizer)}"
        if not folder.exists():
            write_folder(folder, lambda target: _write(target, documents, tokenizer))
            log.info("Tokens of %d documents are kept in %s", len(documents), folder)
        return cls(folder)


def _digest(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(f"{FORMAT}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(backend.to_str().encode() if backend else json.dumps(tokenizer.get_vocab()).encode())
    for document in documents:
        for part in (document.id, document.text):
            data = part.encode(errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def _write(target: Path, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> None:
    pieces: list[np.ndarray] = []
    batch = 64  # the tokenizer works on a batch with all cores
    for i in track(range(0, len(documents), batch), description=f"Tokenising {len(documents)} documents"):
        texts = [document.text for document in documents[i : i + batch]]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.extend(np.asarray(ids, dtype=np.int32) for ids in encoded)
    np.save(target / "tokens.npy", np.concatenate(pieces) if pieces else np.zeros(0, np.int32))
    facts = {"ids": [d.id for d in documents], "lengths": [len(p) for p in pieces]}
    (target / "documents.json").write_text(json.dumps(facts))
