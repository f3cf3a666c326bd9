"""Whether memory settings can go with the data's and the model's; told before a run begins."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning_memlong.config import MemoryConfig, require

log = logging.getLogger(__name__)


def check_memory(config: MemoryConfig, data: Any, pl_module: Any, stage: str) -> None:
    """Check memory settings.

    Args:
        config: The settings.
        data: The DataModule, or anything with its ``window`` and ``stride``; None: not known.
        pl_module: The MemLongModule.
        stage: ``fit``, ``validate`` or ``test``.

    Raises:
        UserError: If they cannot go together.
    """
    for name in ("window", "stride"):
        tokens = getattr(data, name, None)
        ok, allowed = tokens is None or tokens % config.chunk_size == 0, f"a divisor of data.{name}={tokens}"
        require(ok, "memory.chunk_size", config.chunk_size, allowed, "change one of the two")
    window = getattr(data, "window", 0)
    allowed = f"at least data.window={window} tokens"
    require(config.capacity >= window, "memory.capacity", config.capacity, allowed, "raise it, or lower --data.window")
    ok = config.save_keys_values or stage != "fit" or pl_module.model.layout.source == "single"
    allowed = "true, or model.source single: other layers' keys and values belong to the weights of their time"
    require(ok, "memory.save_keys_values", config.save_keys_values, allowed, "leave it out")
    attention = "auto" if pl_module is None else pl_module.model.layout.attention
    allowed = f"null with model.attention={attention}, by which all tokens read the same"
    ok = config.candidates is None or attention in ("auto", "two_part")
    require(ok, "memory.candidates", config.candidates, allowed, "set --model.attention auto")
    rows = getattr(data, "batch_size", None)
    allowed = f"less than data.batch_size={rows}: each is another row of the batch"
    fix = "raise --data.batch_size, or lower it"
    ok = stage != "fit" or rows is None or config.distractors < rows
    require(ok, "memory.distractors", config.distractors, allowed, fix)
    if config.policy == "none" and hasattr(data, "longest_document"):
        _require_room(config.capacity, data.longest_document(stage))


def check_batch(batch: Mapping[str, Any], rows: int, chunk_size: int) -> None:
    """Check a batch, which may come from a DataModule of one's own.

    Args:
        batch: With ``input_ids`` (B, T).
        rows: Of the bank, which are those of the first batch.
        chunk_size: Tokens of a chunk.

    Raises:
        UserError: If it does not fit the bank.
    """
    found, tokens = batch["input_ids"].shape
    allowed = f"{rows}, as in the first one: each is a document stream, and idle ones have windows of length 0"
    require(found == rows, "data: rows of a batch", found, allowed, "pad the batch, or leave it out")
    allowed = f"a multiple of memory.chunk_size={chunk_size}"
    require(tokens % chunk_size == 0, "data: tokens of a window", tokens, allowed, "pad it")


def _require_room(capacity: int, longest: int | None) -> None:
    """Without eviction, say before the run starts whether a document can overflow the bank."""
    if longest is None:
        log.warning("memory.policy=none: a document of more than %d tokens will stop the run", capacity)
        return
    allowed = f"at least the {longest} tokens of the longest document, as memory.policy=none drops nothing"
    fix = "raise it, cut documents with --data.max_document_tokens, or choose another policy"
    require(capacity >= longest, "memory.capacity", capacity, allowed, fix)
