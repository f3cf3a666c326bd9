"""Retrieval causal attention as functions of tensors, and how it is computed."""

from lightning_memlong.attention.choice import Choice
from lightning_memlong.attention.functional import (
    BACKENDS,
    attend_with_memory,
    local_attention,
    require_gradients,
    retrieval_causal_attention,
)
from lightning_memlong.attention.inputs import Memo, RetrievedKV, Scores
from lightning_memlong.attention.kernels import compute_dtype
from lightning_memlong.attention.use import Readers, chunk_shares

__all__ = [
    "BACKENDS",
    "Choice",
    "Memo",
    "Readers",
    "RetrievedKV",
    "Scores",
    "attend_with_memory",
    "chunk_shares",
    "compute_dtype",
    "local_attention",
    "require_gradients",
    "retrieval_causal_attention",
]
