"""CUDA's fused kernels: flash attention, and where there is a mask or float32, memory-efficient attention.

Legend: B rows, H query heads, H_kv key/value heads, T tokens, S keys, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.attention.kernels import AttentionState, additive, as_4d
from lightning_memlong.attention.two_part import FusedKernel, Gradients, Part

LONGEST_FLASH_HEAD, OLDEST_FLASH_CARD = 256, (8, 0)
"""Flash attention takes heads up to this size, on cards of this compute capability or newer."""
HEAD_ALIGNMENT, BIAS_ALIGNMENT, LSE_ALIGNMENT = 8, 16, 32
"""What the kernels want head sizes, rows of a mask and log-sum-exps to be multiples of, as PyTorch's own call pads."""


def _function(name: str) -> Any:
    return getattr(getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None), "default", None)


flash, flash_backward = _function("flash_attention"), _function("flash_attention_backward")
efficient, efficient_backward = _function("efficient_attention"), _function("efficient_attention_backward")


def can_use_cuda_kernel(query: Tensor, dropout: float) -> bool:
    """Whether :data:`CUDA_KERNEL` applies: on CUDA (not ROCm), in float32, bfloat16 or float16."""
    there = None not in (flash, flash_backward, efficient, efficient_backward) and torch.version.hip is None
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return there and query.is_cuda and query.dtype in kinds and dropout == 0.0


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> AttentionState:
    size, tokens = query.shape[-1], query.shape[2]
    q, k, v = (_aligned(t, HEAD_ALIGNMENT) for t in (query, key, value))
    if _takes_flash(q, mask):
        output, lse = flash(q, k, v, 0.0, causal, return_debug_mask=False, scale=scale)[:2]
    else:
        k, v = _of_all_heads(q, k), _of_all_heads(q, v)
        bias = _bias(mask, q, k)
        output, lse = efficient(q, k, v, bias, True, 0.0, causal and mask is None, scale=scale)[:2]
    return output.narrow(-1, 0, size), lse.narrow(-1, 0, tokens)


def _gradient(part: Part, mask: Tensor | None, causal: bool) -> Gradients:
    size, lse, scale = part.query.shape[-1], part.lse, part.scale
    given = (part.grad.to(part.query.dtype), part.query, part.key, part.value, part.output)
    g, q, k, v, o = (_aligned(t, HEAD_ALIGNMENT) for t in given)
    if _takes_flash(q, mask):
        # Nothing is dropped at random, so what it would be drawn from is not read.
        seed, offset = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
        found = flash_backward(
            g, q, k, v, o, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset, scale=scale
        )
    else:
        shared, k, v = k.shape[1], _of_all_heads(q, k), _of_all_heads(q, v)
        padded = F.pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=float("inf"))  # as it pads its own
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        found = efficient_backward(
            g, q, k, v, _bias(mask, q, k), _by_tokens(o), padded, seed, seed, 0.0, [True, True, True, False],
            causal and mask is None, scale=scale,
        )  # fmt: skip
        if shared != q.shape[1]:
            found = found[0], *(t.unflatten(1, (shared, -1)).sum(2) for t in found[1:3])
    of_query, of_key, of_value = (t.narrow(-1, 0, size) for t in found[:3])
    return of_query, of_key, of_value


def _query_gradient(part: Part, memory_mask: Tensor | None, kept: Tensor | None) -> Tensor:
    if kept is not None:
        raise ValueError("tokens that choose what they read need plain operations on CUDA")
    return _gradient(part, memory_mask, False)[0]


def _takes_flash(query: Tensor, mask: Tensor | None) -> bool:
    if mask is not None or query.dtype == torch.float32 or query.shape[-1] > LONGEST_FLASH_HEAD:
        return False
    # Without a card, where shapes and types alone are computed, any card is thought of.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(query.device) >= OLDEST_FLASH_CARD


def _aligned(tensor: Tensor, multiple: int) -> Tensor:
    """The same with a last dimension that is a multiple, zeros behind it."""
    return F.pad(tensor, (0, -tensor.shape[-1] % multiple)) if tensor.shape[-1] % multiple else tensor


def _by_tokens(tensor: Tensor) -> Tensor:
    """(B, H, T, D) laid out token by token, in each its heads: the only way memory-efficient attention reads outputs.

    (PyTorch issue 138772; other strides are believed, and wrong numbers come out.)
    """
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _of_all_heads(query: Tensor, tensor: Tensor) -> Tensor:
    """Keys or values (B, H_kv, S, D) for each query head (B, H, S, D)."""
    group = query.shape[1] // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask (B, S), or (B or 1, 1, T, S), as what is added to scores (B, H, T, S), without a copy a head or query."""
    if (bias := additive(as_4d(mask), query.dtype)) is None:
        return None
    bias, keys = bias.to(query.dtype), bias.shape[-1]
    if keys % BIAS_ALIGNMENT or any(step % BIAS_ALIGNMENT for step in bias.stride()[:3]) or bias.stride(3) != 1:
        bias = F.pad(bias, (0, -keys % BIAS_ALIGNMENT)).contiguous().narrow(-1, 0, keys)
    return bias.expand(*query.shape[:3], keys)


CUDA_KERNEL = FusedKernel(_attend, _gradient, _query_gradient)
"""PyTorch's own kernels for CUDA, whose log-sum-exps its public function does not tell.

``torch.distributed``'s context parallelism merges parts by the same functions. Gradients of retrieved keys and values
are computed and dropped.
"""
