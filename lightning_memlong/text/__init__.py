"""Tokens and windows of documents, without any model."""

from lightning_memlong.text.given import Text, as_tokens
from lightning_memlong.text.tokenise import tokenise, tokenizer_digest
from lightning_memlong.text.windows import (
    ON_DEVICE,
    Batch,
    WindowBatch,
    Windows,
    WindowSpec,
    sent,
    to_device,
    window_offsets,
)

__all__ = [
    "ON_DEVICE",
    "Batch",
    "Text",
    "WindowBatch",
    "WindowSpec",
    "Windows",
    "as_tokens",
    "sent",
    "tokenise",
    "tokenizer_digest",
    "to_device",
    "window_offsets",
]
