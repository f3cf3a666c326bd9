"""Texts of any length: prefilled into a bank, and continued with it."""

from lightning_memlong.generation.conversation import Conversation, Passage, Prompt, are_several, one_each
from lightning_memlong.generation.hf_generate import GenerateAdapter, loop_options, refused
from lightning_memlong.generation.local_context import LocalContext
from lightning_memlong.generation.long_context import LongContext
from lightning_memlong.generation.plain_context import PlainContext, Sliding
from lightning_memlong.generation.prefill import (
    Span,
    evaluating,
    first_of_all,
    read_windows,
    reading_stride,
    sink_before,
)
from lightning_memlong.generation.sink_cache import SinkCache

__all__ = [
    "Conversation",
    "GenerateAdapter",
    "LocalContext",
    "LongContext",
    "Passage",
    "PlainContext",
    "Prompt",
    "SinkCache",
    "Sliding",
    "Span",
    "are_several",
    "evaluating",
    "first_of_all",
    "loop_options",
    "one_each",
    "read_windows",
    "reading_stride",
    "refused",
    "sink_before",
]
