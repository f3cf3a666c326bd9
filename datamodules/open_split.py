"""From the shards of a split to its stream: tokenised beforehand or on the way, without what cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from datamodules import splits
from datamodules.cached import CachedStream
from datamodules.records import Shard
from datamodules.resolve_source import Located
from datamodules.shuffle import Corpus
from datamodules.streaming import LiveStream
from datamodules.token_cache import Document, TokenCache
from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError
from lightning_memlong.text import Windows

if TYPE_CHECKING:
    from datamodules.documents import DocumentDataModule

Stream = CachedStream | LiveStream


def open_split(
    data: DocumentDataModule, found: Located, tokenizer: PreTrainedTokenizerBase, part: str, stage: str
) -> dict[str, Stream]:
    """The stream of a split, by its name; with those of the other splits, where only reading everything tells them.

    Args:
        data: Its settings, and what its documents are.
        found: Where it is.
        tokenizer: Turns text into tokens.
        part: Which split.
        stage: What it is wanted for.

    Raises:
        UserError: If there is no such split, nothing in it, or a document of it cannot be used.
    """
    shards = found.of(part, data.how)
    by_hash = found.undivided and data.how != "all"
    cache = (by_hash and not found.on_hub) or data.cache_by_default if data.cache is None else data.cache
    if cache:
        return _cached(data, found, tokenizer, shards, splits.ROLES if found.undivided else (part,), stage)
    say(f"Data: {data.name}, {part} streamed from {found.where} ({len(shards)} shards)", flush=True)
    return {part: _live(data, found, tokenizer, part, shards, by_hash)}


def _live(
    data: DocumentDataModule,
    found: Located,
    tokenizer: PreTrainedTokenizerBase,
    part: str,
    shards: Sequence[Shard],
    by_hash: bool,
) -> LiveStream:
    def read(index: int, start: int) -> Iterator[Document]:
        documents = data.documents(shards, index, start)
        if not by_hash:
            return documents
        return (d for d in documents if splits.hash_role(d.id, data.validation_fraction) == part)

    next(data.documents(shards, 0), None)  # a source that cannot be read at all is told before a run begins
    divided = (part, data.how, data.validation_fraction) if found.undivided else (part,)
    facts = (data.recipe(), divided, _identities(shards, content=False))
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    seed = _seed(data, part)
    return LiveStream(
        Corpus(f"{data.name} ({part})", tuple(shard.name for shard in shards), read, digest),
        tokenizer,
        _windows(data, tokenizer),
        seed,
        1 if seed is None else data.shuffle_buffer,
        2 if data.num_workers is None else data.num_workers,
        max(2, data.min_document_tokens or 0),
        data.max_document_tokens,
        lambda document, length: is_bad(data, found, document, length),
    )


def _cached(
    data: DocumentDataModule,
    found: Located,
    tokenizer: PreTrainedTokenizerBase,
    shards: Sequence[Shard],
    parts: Sequence[str],
    stage: str,
) -> dict[str, Stream]:
    def documents() -> Iterable[Document]:
        for index in range(len(shards)):
            for document in data.documents(shards, index):
                if document.problem is not None:  # told now, not when all others have been tokenised
                    is_bad(data, found, document, 0)
                yield document

    source = repr((data.recipe(), _identities(shards, content=True)))
    cache = TokenCache.build(data.name, source, documents, tokenizer)
    usable, told = _usable(data, found, cache)
    everything = list(range(len(usable)))
    if len(parts) == 1:
        members = {parts[0]: everything}
    elif data.how == "all":
        members = {"train": [], "validation": everything, "test": everything}
    else:
        members = splits.by_hash([cache.ids[i] for i in usable], data.validation_fraction)
    if len(parts) > 1:
        splits.require_parts(members, stage, data.how, len(usable))
    counts = ", ".join(f"{part} {len(places)}" for part, places in members.items())
    say(f"Data: {data.name}, {sum(cache.lengths):,} tokens; documents: {counts}{told}", flush=True)
    windows, workers = _windows(data, tokenizer), data.num_workers or 0
    return {
        part: CachedStream(cache, [usable[i] for i in places], windows, _seed(data, part), workers)
        for part, places in members.items()
    }


def _usable(data: DocumentDataModule, found: Located, cache: TokenCache) -> tuple[list[int], str]:
    """Documents of a cache that are neither bad nor too short, and the others in words."""
    bad = sum(is_bad(data, found, Document(name, "", problem=why), 0) for name, why in cache.problems)
    good = [i for i, n in enumerate(cache.lengths) if not is_bad(data, found, Document(cache.ids[i], ""), n)]
    if data.max_document_tokens:
        cache.lengths = [min(n, data.max_document_tokens) for n in cache.lengths]
    bad += len(cache) - len(good)
    least = max(2, data.min_document_tokens or 0)
    usable = [i for i in good if cache.lengths[i] >= least]
    short = f"; {len(good) - len(usable)} shorter than {least} tokens left out" if len(usable) < len(good) else ""
    told = short + (f"; {bad} that cannot be used left out" if bad else "")
    if not usable:
        raise UserError(
            f"data.min_document_tokens={data.min_document_tokens}: the longest of {len(cache)} documents has "
            f"{max(cache.lengths, default=0)} tokens{told}. Allowed: at most that. Fix: lower it, or add longer text."
        )
    return usable, told


def is_bad(data: DocumentDataModule, found: Located, document: Document, length: int) -> bool:
    """Whether a document cannot be used.

    Raises:
        UserError: If it cannot, and such are not to be skipped.
    """
    why = document.problem
    if why is None and data.min_document_tokens is None and length < data.chunk_size:
        why = f"it has {length} tokens, fewer than one chunk ({data.chunk_size})"
    if why is not None and data.on_bad_document == "raise":
        raise UserError(
            f"data: {document.id} (in {found.where}) cannot be used: {why}. Allowed: readable UTF-8 text. Fix: repair "
            "or remove it; or --data.on_bad_document skip, which leaves such documents out and counts them; for short "
            "ones, --data.min_document_tokens."
        )
    return why is not None


def _identities(shards: Sequence[Shard], content: bool) -> list[str]:
    with ThreadPoolExecutor(16) as pool:  # of an address each is a question to the server
        return list(pool.map(lambda shard: shard.identity(content), shards))


def _seed(data: DocumentDataModule, part: str) -> int | None:
    return data.seed if part == "train" and data.shuffle else None


def _windows(data: DocumentDataModule, tokenizer: PreTrainedTokenizerBase) -> Windows:
    return Windows(data.window, data.stride, data.batch_size, tokenizer.pad_token_id or 0)
