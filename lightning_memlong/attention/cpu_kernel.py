"""The CPU's fused kernel.

Legend: R rows, H query heads, H_kv key/value heads, T tokens, M retrieved tokens, n chunks of them, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_memlong.attention.kernels import AttentionState, additive, as_4d
from lightning_memlong.attention.two_part import FusedKernel, Gradients, Part

_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def can_use_cpu_kernel(query: Tensor, dropout: float) -> bool:
    """Whether :data:`CPU_KERNEL` applies: on the CPU, in float32 or bfloat16."""
    return (
        _forward is not None
        and _backward is not None
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and dropout == 0.0
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> AttentionState:
    bias = additive(as_4d(mask), query.dtype)
    return _forward(query, key, value, 0.0, causal and bias is None, attn_mask=bias, scale=scale)


def _gradient(part: Part, mask: Tensor | None, causal: bool) -> Gradients:
    given = (part.grad, part.query, part.key, part.value, part.output, part.lse)
    return _backward(*given, 0.0, causal, attn_mask=mask, scale=part.scale)


def _query_gradient(part: Part, memory_mask: Tensor | None, kept: Tensor | None) -> Tensor:
    """Head by head so that scores stay in cache; in float32.

    With P = exp(q K^T - lse), dP = dO V^T and delta = rowsum(dO * O), the gradient of scores is dS = P * (dP - delta),
    so dQ = dS K.
    """
    query, grad = part.query, part.grad
    result, delta = torch.zeros_like(query), (grad.float() * part.output.float()).sum(-1)
    group = query.shape[1] // part.key.shape[1]
    for row in range(query.shape[0]):
        real = slice(None) if memory_mask is None else memory_mask[row].nonzero().flatten()
        for head in range(query.shape[1]):
            keys, values = (t[row, head // group, real].float() for t in (part.key, part.value))
            q, g = query[row, head].float(), grad[row, head].float()
            scores = torch.addmm(part.lse[row, head][:, None], q, keys.T, beta=-1, alpha=part.scale).exp_()
            scores.mul_(torch.addmm(delta[row, head][:, None], g, values.T, beta=-1))
            if kept is not None:
                size = part.key.shape[2] // kept.shape[3]
                scores.mul_(kept[row, head].repeat_interleave(size, dim=1)[:, real])
            result[row, head] = torch.mm(scores, keys).mul_(part.scale)
    return result


CPU_KERNEL = FusedKernel(_attend, _gradient, _query_gradient)
"""PyTorch's flash attention for the CPU.

Gradients of memory's queries are made by products of matrices: its own backward pass would compute those of retrieved
keys and values as well.
"""
