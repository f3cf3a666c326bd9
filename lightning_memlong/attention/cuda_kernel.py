"""CUDA's fused kernels: flash attention, and where there is a mask or float32, memory-efficient attention.

Legend: B rows, H query heads, H_kv key/value heads, T tokens, S keys, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.attention.kernels import AttentionState, additive, as_4d
from lightning_memlong.attention.two_part import FusedKernel, Gradients

HEAD_ALIGNMENT, BIAS_ALIGNMENT, LSE_ALIGNMENT = 8, 16, 32
"""What the kernels want head sizes, rows of a mask and log-sum-exps to be multiples of, as PyTorch's own call pads."""
flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", None)
efficient: Any = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)
efficient_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention_backward", None)


def can_use_cuda_kernel(query: Tensor, dropout: float) -> bool:
    """Whether :data:`CUDA_KERNEL` applies: on CUDA, in float32, bfloat16 or float16."""
    there = None not in (flash, flash_backward, efficient, efficient_backward)
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


def _gradient(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Gradients:
    size = query.shape[-1]
    g, q, k, v, o = (_aligned(t, HEAD_ALIGNMENT) for t in (grad.to(query.dtype), query, key, value, output))
    if _takes_flash(q, mask):
        # Nothing is dropped at random, so what it would be drawn from is not read.
        seed, offset = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
        found = flash_backward(
            g, q, k, v, o, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset, scale=scale
        )
    else:
        shared, k, v = k.shape[1], _of_all_heads(q, k), _of_all_heads(q, v)
        padded = F.pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=float("inf"))  # as it pads its own
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        found = efficient_backward(
            g, q, k, v, _bias(mask, q, k), o, padded, seed, seed, 0.0, [True, True, True, False],
            causal and mask is None, scale=scale,
        )  # fmt: skip
        found = found[0], *(t.unflatten(1, (shared, -1)).sum(2) for t in found[1:3])
    of_query, of_key, of_value = (t.narrow(-1, 0, size) for t in found[:3])
    return of_query, of_key, of_value


def _query_gradient(
    grad: Tensor,
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    output: Tensor,
    lse: Tensor,
    memory_mask: Tensor | None,
    kept: Tensor | None,
    scale: float,
) -> Tensor:
    if kept is not None:
        raise ValueError("tokens that choose what they read need plain operations on CUDA")
    return _gradient(grad, query, memory_key, memory_value, output, lse, memory_mask, False, scale)[0]


def _takes_flash(query: Tensor, mask: Tensor | None) -> bool:
    return mask is None and query.dtype != torch.float32


def _aligned(tensor: Tensor, multiple: int) -> Tensor:
    """The same with a last dimension that is a multiple, zeros behind it."""
    return F.pad(tensor, (0, -tensor.shape[-1] % multiple)) if tensor.shape[-1] % multiple else tensor


def _of_all_heads(query: Tensor, tensor: Tensor) -> Tensor:
    """Keys or values (B, H_kv, S, D) for each query head (B, H, S, D)."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask (B, S), or (B or 1, 1, T, S), as what is added to scores (B, H, T, S), nothing of it written out anew."""
    if (bias := additive(as_4d(mask), query.dtype)) is None:
        return None
    keys = bias.shape[-1]
    return _aligned(bias, BIAS_ALIGNMENT).narrow(-1, 0, keys).expand(*query.shape[:3], keys)


CUDA_KERNEL = FusedKernel(_attend, _gradient, _query_gradient)
"""PyTorch's own kernels for CUDA, whose log-sum-exps its public function does not tell.

``torch.distributed``'s context parallelism merges parts by the same functions. Gradients of retrieved keys and values
are computed and dropped.
"""
