"""Joint attention on the CPU in two parts, merged by their log-sum-exp.

PyTorch's masked attention spends as much on [memory | local] as on a square of that size, and its backward pass
computes gradients of keys and values that are never trained. Here the local part runs the plain causal kernel, the
memory part runs unmasked, the two are merged exactly (the online-softmax identity of FlashAttention, arXiv
2205.14135), and the backward pass of the memory part computes the gradient of the queries only. Nothing of size
(T, M + T) is ever built.
"""

from typing import Any

import torch
from torch import Tensor

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def can_split(query: Tensor, memory_mask: Tensor | None, dropout: float) -> bool:
    """Whether the two-part kernel applies: on the CPU, all in float32, with no padding among retrieved tokens."""
    return (
        _forward is not None
        and _backward is not None
        and query.device.type == "cpu"
        and query.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")  # queries stay float32 there, values do not
        and dropout == 0.0
        and memory_mask is None
    )


class SplitJointAttention(torch.autograd.Function):
    """One softmax over [memory | causal local]; differentiable in query, key and value, not in memory."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float
    ) -> Tensor:
        """Arguments as for ``retrieval_causal_attention``; returns (B, H, T, D)."""
        local, local_lse = _forward(query, key, value, 0.0, True, scale=scale)  # type: ignore[misc]
        remembered, memory_lse = _forward(query, memory_key, memory_value, 0.0, False, scale=scale)  # type: ignore[misc]
        lse = torch.logaddexp(local_lse, memory_lse)
        output = local.mul_((local_lse - lse).exp()[..., None])
        output.addcmul_(remembered, (memory_lse - lse).exp()[..., None])
        ctx.save_for_backward(query, key, value, memory_key, memory_value, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The flash backward pass, given the merged output and log-sum-exp, yields each part's exact share."""
        (grad,) = grad_outputs
        query, key, value, memory_key, memory_value, output, lse = ctx.saved_tensors
        grad_query, grad_key, grad_value = _backward(  # type: ignore[misc]
            grad, query, key, value, output, lse, 0.0, True, scale=ctx.scale
        )
        add_memory_gradient(grad_query, grad, query, memory_key, memory_value, output, lse, ctx.scale)
        return grad_query, grad_key, grad_value, None, None, None


def add_memory_gradient(
    grad_query: Tensor,
    grad: Tensor,
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Add the memory part's gradient of the queries, in place, head by head so that scores stay in cache.

    With P = exp(q K^T - lse), dP = dO V^T and delta = rowsum(dO * O): dQ = (P * (dP - delta)) K.
    """
    rows, heads = query.shape[:2]
    group = heads // memory_key.shape[1]
    delta = (grad * output).sum(-1, keepdim=True)
    for row in range(rows):
        for head in range(heads):
            keys, values = memory_key[row, head // group], memory_value[row, head // group]
            scores = torch.addmm(lse[row, head][:, None], query[row, head], keys.T, beta=-1, alpha=scale).exp_()
            scores.mul_(torch.addmm(delta[row, head], grad[row, head], values.T, beta=-1))
            grad_query[row, head].addmm_(scores, keys, alpha=scale)
