"""Retrieval causal attention as functions of tensors, and how it is computed."""

from lightning_memlong.attention.functional import (
    BACKENDS,
    Memo,
    RetrievedKV,
    Scores,
    attend_with_memory,
    local_attention,
    require_gradients,
    retrieval_causal_attention,
)
from lightning_memlong.attention.kernels import compute_dtype

__all__ = [
    "BACKENDS",
    "Memo",
    "RetrievedKV",
    "Scores",
    "attend_with_memory",
    "compute_dtype",
    "local_attention",
    "require_gradients",
    "retrieval_causal_attention",
]
