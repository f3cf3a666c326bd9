"""FlexAttention (PyTorch): fused kernels on CUDA for masks and soft-capped scores that no other fused kernel takes."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from lightning_memlong.attention.kernels import AttentionState, as_4d


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


@cache
@torch.inference_mode(False)  # it is used by training, whoever asked first
def _causal(tokens: int, keys: int, device: str) -> BlockMask:
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, tokens, keys, device=device)


def as_block_mask(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> BlockMask | None:
    """What FlexAttention takes for a mask, as :func:`kernels.blockwise` does, or for causality."""
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None:
        return _causal(tokens, keys, str(query.device)) if causal else None
    seen = as_4d(mask if mask.dtype == torch.bool else mask == 0)
    assert seen is not None
    rows, _, queries, _ = seen.shape
    flat = seen[:, 0]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return flat[b * (rows > 1), q * (queries > 1), k]

    return create_block_mask(visible, rows, None, tokens, keys, device=str(query.device))


def flex(
    query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask | None, scale: float, softcap: float | None
) -> AttentionState:
    """Attention and its log-sum-exp, shapes as in :func:`lightning_memlong.attention.kernels.blockwise`.

    On the CPU it runs uncompiled and without gradients, which PyTorch does not offer there.
    """

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    function = _compiled() if query.is_cuda else flex_attention
    output, aux = function(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return output, aux.lse
