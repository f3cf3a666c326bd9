"""Settings of the memory bank, and of the encoder that it is searched with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_memlong.config.checks import is_import_path, require, require_choice, require_types

QueryPooling = Literal["mean", "max"]
Query = Literal["previous", "current"]
Granularity = Literal["window", "chunk"]
BankDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
RetrieverDtype = Literal["auto", "float32", "bfloat16"]
Storage = Literal["device", "host", "disk"]
Use = Literal["retrieved", "attention"]
CHOICES = {
    "use": Use,
    "query": Query,
    "query_pooling": QueryPooling,
    "granularity": Granularity,
    "dtype": BankDtype,
    "storage": Storage,
}
"""What is allowed for options of a few names."""


@dataclass
class RetrieverConfig:
    """The frozen text encoder that embeds chunks (paper, section 2: the retriever)."""

    name: str = "all-MiniLM-L6-v2"
    """Encoder: 'all-MiniLM-L6-v2' (installed with the project), any sentence-transformers hub id or folder
    (the paper uses BAAI/bge-m3), 'bm25' (words, no model), 'hybrid' (all-MiniLM-L6-v2 and bm25 at once, by the sum of
    their standardised scores), 'hidden' (mean hidden states of the memory layer, no second model), 'hashing'
    (deterministic bag of words, no model), or the import path of a class of your own."""
    prompt: str = ""
    """Put before each text, where an encoder was trained with it ('query: ' for E5)."""
    batch_size: int = 32
    """Texts encoded at once [texts]."""
    max_length: int | None = None
    """Longest piece given to the encoder [encoder tokens]; longer chunks are embedded in pieces and averaged.
    null: the encoder's own limit."""
    dtype: str = "auto"
    """Element type the encoder computes in: auto, as it was saved; float32; bfloat16, for a large one on a GPU.
    Embeddings of each are kept apart on disk, and a bank belongs to one."""
    cache: bool = True
    """Keep embeddings on disk, in $MEMLONG_CACHE, so that no chunk is encoded twice: not in later epochs, resumed
    runs or ablations. About 1.5 kB a chunk at 384 dimensions."""

    def __post_init__(self) -> None:
        """Check each value."""
        require_types(self, "memory.retriever")
        require_choice("memory.retriever.dtype", self.dtype, RetrieverDtype)
        require(self.batch_size >= 1, "memory.retriever.batch_size", self.batch_size, "1 or more", "raise it")
        ok, allowed = self.max_length is None or self.max_length >= 8, "null, or 8 or more encoder tokens"
        require(ok, "memory.retriever.max_length", self.max_length, allowed, "raise it or leave it out")

    @property
    def identity(self) -> str:
        """What of this changes embeddings: the name, and whatever is not as a matter of course."""
        length = "" if self.max_length is None else f"max_length={self.max_length}"
        dtype = "" if self.dtype == "auto" else self.dtype
        return " ".join(part for part in (self.name, self.prompt.strip(), dtype, length) if part)


@dataclass
class MemoryConfig:
    """The memory bank and how it is read (the MemoryBankCallback's settings)."""

    enabled: bool = True
    """Use the memory at all; false trains and evaluates the plain backbone."""
    chunk_size: int = 128
    """Tokens in one bank entry [tokens]; must divide data.window and data.stride. Paper, section 3: 128."""
    capacity: int = 16384
    """Size of the bank of one batch row [tokens]; a multiple of chunk_size. Paper, section 3: 32,768."""
    top_k: int = 3
    """Chunks read [chunks]. Paper, section 3: 8."""
    candidates: int | None = None
    """Chunks retrieved for a window, of which each token and head reads the top_k that its own attention scores are
    highest in [chunks]; null: top_k are retrieved, and all tokens read them."""
    policy: str = "retrieval_frequency"
    """What to evict when the bank is full: retrieval_frequency (paper, section 2: dynamic memory update), fifo, lru
    (retrieved longest ago), score (least similarity gathered), none (a document that does not fit stops the run), or
    the import path of a function of your own, such as my_package.my_policy."""
    policy_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the policy, for instance {keep_newest: 0.1, drop_oldest: 0.1, target_fill: 0.5}."""
    use: Use = "retrieved"
    """What counts as use of an entry, for its counter and the policies that look at use. retrieved: 1 each time it is
    retrieved (the paper); attention: the share it got of the attention its window paid to all that was retrieved, times
    their number, so that windows count the same in both."""
    half_life: float | None = None
    """Insertions into a row after which a retrieval counts for half in its entry's counter [chunks]; null: it counts
    for ever (the paper)."""
    query: Query = "previous"
    """What a window retrieves with: previous (the chunks before it; causal) or current (the text of the window
    itself, as the reference code does: it LEAKS the tokens being predicted and is only for comparison)."""
    query_chunks: int = 2
    """Chunks before the predicted tokens that ask, for the 'previous' query [chunks]."""
    query_pooling: QueryPooling = "mean"
    """How they ask: mean (with their mean embedding) or max (each for itself: an entry is as similar as to the nearest
    of them)."""
    selection: str = "similarity"
    """How chunks are chosen: similarity (retrieval), mix (the newest, and the most similar of the others), neighbours
    (the most similar, each with those beside it in the document), the controls recent and random, or the import path of
    a function of your own, such as my_package.my_selector."""
    newest: float = 0.25
    """Of the chunks retrieved, what selection mix takes for being the newest [share]."""
    granularity: Granularity = "window"
    """What retrieves: window (all tokens of a window attend to one set of top_k chunks, chosen with the text before the
    window) or chunk (each chunk of the window attends to a set of its own, chosen with the text before that chunk;
    finer and just as causal)."""
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    """The frozen text encoder."""
    index: str = "Flat"
    """FAISS index_factory string. Flat is exact; others (for instance IVF64,Flat) are approximate, and are trained
    anew on the stored embeddings when a run is resumed."""
    dtype: BankDtype = "auto"
    """Element type of stored keys and values; auto keeps what the model computes; int8 keeps a scale for each head of
    each token."""
    storage: Storage = "device"
    """Where keys and values live: device; host (the machine's memory: the device holds what was retrieved only); disk
    (a temporary file, gone when the process is)."""
    storage_folder: str | None = None
    """Folder of that file; null: the system's for temporary files."""
    save_keys_values: bool = True
    """Keep keys and values in checkpoints. false: leave them out and read the documents again when a run is resumed;
    for model.source single, whose stored layer is frozen, so that they come out the same."""
    seed: int = 0
    """Seed of the 'random' selection."""
    distractors: int = 0
    """In training, other rows of the batch whose chunks stand beside a window's own [rows]: top_k chunks of each,
    chosen by the same query; less than data.batch_size. 1 is d = 2 of Focused Transformer (arXiv 2307.03170)."""

    def __post_init__(self) -> None:
        """Check each value, and the values against each other."""
        require_types(self, "memory")
        for name in ("chunk_size", "top_k", "query_chunks"):
            value = getattr(self, name)
            require(value >= 1, f"memory.{name}", value, "1 or more", "raise it, or set --memory.enabled false")
        for name, choices in CHOICES.items():
            require_choice(f"memory.{name}", getattr(self, name), choices)
        require(self.distractors >= 0, "memory.distractors", self.distractors, "0 or more", "use 0, or raise it")
        ok = self.half_life is None or self.half_life > 0
        require(ok, "memory.half_life", self.half_life, "null, or above 0 chunks", "leave it out, or raise it")
        beforehand = self.query == "current" or self.granularity == "chunk"
        require(
            self.retriever.name != "hidden" or not beforehand,
            "memory.retriever.name",
            self.retriever.name,
            "an encoder of texts, for query current or granularity chunk: hidden states of a window come after it",
            "choose another retriever, or --memory.query previous --memory.granularity window",
        )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Check numbers of chunks and tokens against each other."""
        require(0 <= self.newest <= 1, "memory.newest", self.newest, "a share from 0 to 1", "use 0.25")
        ok = self.capacity >= 2 * self.chunk_size and self.capacity % self.chunk_size == 0
        allowed = f"a multiple of memory.chunk_size={self.chunk_size}, at least two chunks"
        fix = f"use {max(2, round(self.capacity / self.chunk_size)) * self.chunk_size}"
        require(ok, "memory.capacity", self.capacity, allowed, fix)
        allowed = f"null, or at least memory.top_k={self.top_k} chunks"
        ok = self.candidates is None or self.candidates >= self.top_k
        require(ok, "memory.candidates", self.candidates, allowed, "raise it, lower memory.top_k, or leave it out")
        name = "top_k" if self.candidates is None else "candidates"
        tokens = self.retrieved * self.chunk_size
        require(
            tokens <= self.capacity,
            f"memory.{name}",
            self.retrieved,
            f"{name} x chunk_size (= {tokens} tokens) at most memory.capacity={self.capacity} tokens",
            f"lower --memory.{name} to {self.capacity // self.chunk_size} or raise --memory.capacity",
        )

    @property
    def newest_chunks(self) -> int:
        """Chunks that selection mix takes for being the newest."""
        return round(self.newest * self.retrieved)

    @property
    def retrieved(self) -> int:
        """Chunks retrieved for a window: the candidates, or those that are read."""
        return self.candidates or self.top_k


def require_own_code(memory: MemoryConfig, given: Mapping[str, Any]) -> None:
    """See that what names code to import was given here, and not stored with weights: a stranger may have written that.

    Raises:
        UserError: If it was stored.
    """
    retriever = given.get("retriever") or {}
    encoder = retriever.get("name") if isinstance(retriever, Mapping) else retriever.name
    named = {
        "policy": ("." in memory.policy, memory.policy, given.get("policy")),
        "selection": ("." in memory.selection, memory.selection, given.get("selection")),
        "retriever.name": (is_import_path(memory.retriever.name), memory.retriever.name, encoder),
    }
    allowed = "one of the project's names; an import path from you alone, since importing runs code"
    for name, (is_code, value, asked) in named.items():
        fix = f"give memory.{name} yourself, if you know what it names"
        require(not is_code or asked == value, f"the stored memory.{name}", value, allowed, fix)


def memory_settings(stored: Mapping[str, Any]) -> MemoryConfig:
    """Memory settings that were stored with weights; defaults for those that were not."""
    known = MemoryConfig.__dataclass_fields__
    for name, value in stored.items():
        require(name in known, f"memory.{name}", value, "one of " + ", ".join(known), "remove it from the stored file")
    given = dict(stored)
    if isinstance(given.get("retriever"), Mapping):
        given["retriever"] = RetrieverConfig(**given["retriever"])
    return MemoryConfig(**given)
