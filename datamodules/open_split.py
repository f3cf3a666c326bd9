"""From the shards of a split to its stream: tokenised beforehand or on the way, without what cannot be used."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedTokenizerBase

from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError

from . import splits
from .cached import CachedStream
from .corpus import Corpus
from .records import Document, Shard
from .resolve_source import Source
from .settings import DataSettings
from .shuffle import SplitDocuments
from .streaming import LiveStream
from .token_cache import TokenCache

Stream = CachedStream | LiveStream


def open_split(
    settings: DataSettings, corpus: Corpus, source: Source, tokenizer: PreTrainedTokenizerBase, part: str, stage: str
) -> dict[str, Stream]:
    """The stream of a split, by its name; with those of the other splits, where only reading everything tells them.

    Args:
        settings: How documents are read.
        corpus: What its documents are.
        source: Where they are.
        tokenizer: Turns text into tokens.
        part: Which split.
        stage: What it is wanted for.

    Raises:
        UserError: If there is no such split, nothing in it, or a document of it cannot be used.
    """
    shards = source.shards_of(part, settings.split)
    cache = settings.cache
    if cache is None:
        cache = (_is_hashed(settings, source) and not source.on_hub) or corpus.cache_by_default
    if cache:
        return _open_cached(settings, corpus, source, tokenizer, part, stage)
    say(f"Data: {corpus.name}, {part} streamed from {source.where} ({len(shards)} shards)", flush=True)
    return {part: _open_live(settings, corpus, source, tokenizer, part)}


def _is_hashed(settings: DataSettings, source: Source) -> bool:
    """Whether the split of a document is told by a hash of its text."""
    return source.undivided and settings.split != "all"


# ---- streaming --------------------------------------------------------------------------------------------


def _open_live(
    settings: DataSettings, corpus: Corpus, source: Source, tokenizer: PreTrainedTokenizerBase, part: str
) -> LiveStream:
    shards = source.shards_of(part, settings.split)
    fraction, hashed = settings.validation_fraction, _is_hashed(settings, source)

    held_out = source.held_out if part == "train" else None

    def read(index: int, start: int) -> Iterator[Document]:
        documents = corpus.documents(shards, index, start)
        if hashed:
            return (d for d in documents if splits.hash_role(d.digest(), fraction) == part)
        return documents if held_out is None else filter(held_out.keeps, documents)

    next(corpus.documents(shards, 0), None)  # a source that cannot be read at all is told before a run begins
    divided = ("text", part, settings.split, fraction) if source.undivided else (part,)
    facts = (corpus.recipe(), divided, settings.control_tokens, _identities(shards, content=False),
             held_out and held_out.identity())  # fmt: skip
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    seed = settings.shuffle_seed(part)
    return LiveStream(
        SplitDocuments(f"{corpus.name} ({part})", tuple(shard.name for shard in shards), read, digest, held_out),
        tokenizer,
        settings.windows(tokenizer.pad_token_id),
        seed,
        1 if seed is None else settings.shuffle_buffer,
        2 if settings.num_workers is None else settings.num_workers,
        settings.shortest,
        settings.max_document_tokens,
        lambda document, length: is_bad(settings, source, document, length),
        settings.control_tokens,
    )


# ---- from the cache ---------------------------------------------------------------------------------------


def _open_cached(
    settings: DataSettings, corpus: Corpus, source: Source, tokenizer: PreTrainedTokenizerBase, part: str, stage: str
) -> dict[str, Stream]:
    cache = _build_cache(settings, corpus, source, tokenizer, part)
    usable, told = _usable(settings, source, cache)
    members = _divide(settings, source, cache, usable, part, stage)
    counts = ", ".join(
        f"{name} {len(places):,} ({sum(cache.lengths[usable[i]] for i in places):,} tokens)"
        for name, places in members.items()
    )
    say(f"Data: {corpus.name}; documents: {counts}{told}", flush=True)
    windows, workers = settings.windows(tokenizer.pad_token_id), settings.num_workers or 0
    return {
        name: CachedStream(cache, [usable[i] for i in places], windows, settings.shuffle_seed(name), workers)
        for name, places in members.items()
    }


def _build_cache(
    settings: DataSettings, corpus: Corpus, source: Source, tokenizer: PreTrainedTokenizerBase, part: str
) -> TokenCache:
    shards = source.shards_of(part, settings.split)
    before = _identities(shards, content=False)

    def documents() -> Iterable[Document]:
        for index in range(len(shards)):
            for document in corpus.documents(shards, index):
                if document.problem is not None:  # told now, not when all others have been tokenised
                    is_bad(settings, source, document, 0)
                yield document
        _check_unchanged(source, shards, before)

    key = repr((corpus.recipe(), _identities(shards, content=True)))
    return TokenCache.build(corpus.name, key, documents, tokenizer, settings.control_tokens)


def _check_unchanged(source: Source, shards: Sequence[Shard], before: Sequence[str]) -> None:
    """Raise if a shard is no longer what its digest was made of: other tokens would be found by that digest."""
    pairs = zip(shards, before, _identities(shards, content=False), strict=True)
    if changed := [shard.name for shard, old, new in pairs if old != new]:
        raise UserError(
            f"data: {splits.some(changed)} of {source.where} changed while being read. Allowed: text that stays as it "
            "is while it is tokenised. Fix: run again when nothing writes there any more."
        )


def _divide(
    settings: DataSettings, source: Source, cache: TokenCache, usable: Sequence[int], part: str, stage: str
) -> dict[str, list[int]]:
    """Places of usable documents by split: of one split if the source has its own, else of all of them."""
    everything = list(range(len(usable)))
    if not source.undivided:
        return {part: everything}
    if settings.split == "all":
        members: dict[str, list[int]] = {"train": [], "validation": everything, "test": everything}
    else:
        names, marks = ([column[i] for i in usable] for column in (cache.ids, cache.marks))
        members = splits.by_hash(names, marks, settings.validation_fraction)
    splits.require_parts(members, stage, settings.split, len(usable))
    return members


def _usable(settings: DataSettings, source: Source, cache: TokenCache) -> tuple[list[int], str]:
    """Documents of a cache that are neither bad nor too short, and the others in words."""
    bad = sum(is_bad(settings, source, Document(name, "", problem=why), 0) for name, why in cache.problems)
    good = [i for i, n in enumerate(cache.lengths) if not is_bad(settings, source, Document(cache.ids[i], ""), n)]
    if settings.max_document_tokens:
        cache.lengths = [min(n, settings.max_document_tokens) for n in cache.lengths]
    bad += len(cache) - len(good)
    least = settings.shortest
    usable = [i for i in good if cache.lengths[i] >= least]
    short = f"; {len(good) - len(usable)} shorter than {least} tokens left out" if len(usable) < len(good) else ""
    told = short + (f"; {bad} that cannot be used left out" if bad else "")
    if not usable:
        if cache.problems:
            name, why = cache.problems[0]
            raise UserError(
                f"data: nothing is left of {source.where}{told}: {name}: {why}. Allowed: at least one document that "
                "can be used. Fix: repair, convert or replace it."
            )
        raise UserError(
            f"data.min_document_tokens={settings.min_document_tokens}: the longest of {len(cache)} documents has "
            f"{max(cache.lengths, default=0)} tokens{told}. Allowed: at most that. Fix: lower it, or add longer text."
        )
    return usable, told


# ---- what cannot be used ----------------------------------------------------------------------------------


def is_bad(settings: DataSettings, source: Source, document: Document, length: int) -> bool:
    """Whether a document of so many tokens cannot be used.

    Raises:
        UserError: If it cannot, and such are not to be skipped.
    """
    why = document.problem
    if why is None and settings.min_document_tokens is None and length < settings.chunk_size:
        why = f"it has {length} tokens, fewer than one chunk ({settings.chunk_size})"
    if why is not None and settings.on_bad_document == "raise":
        raise UserError(
            f"data: {document.id} (in {source.where}) cannot be used: {why}. Allowed: readable UTF-8 text. Fix: "
            "repair, convert or remove it; or --data.on_bad_document skip, which leaves such documents out and counts "
            "them; for short ones, --data.min_document_tokens."
        )
    return why is not None


def _identities(shards: Sequence[Shard], content: bool) -> list[str]:
    with ThreadPoolExecutor(16) as pool:  # of an address each is a question to the server
        return list(pool.map(lambda shard: shard.identity(content), shards))
