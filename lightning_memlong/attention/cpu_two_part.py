"""The CPU's fused kernel in two parts, [memory] and [causal local].

Legend: B rows, G groups, H query heads, H_kv key/value heads, T local tokens, M retrieved tokens, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_memlong.attention.choice import Choice, attend_chosen
from lightning_memlong.attention.kernels import (
    AttentionState,
    additive,
    as_4d,
    attend_to_memory,
    fold,
    is_causal,
    merge_attention_states,
    merge_memory,
    seen_and_filled,
    unfold,
)

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def can_use_cpu_two_part(query: Tensor, dropout: float) -> bool:
    """Whether :class:`CPUTwoPartAttention` applies: on the CPU, in float32 or bfloat16."""
    return (
        _forward is not None
        and _backward is not None
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and dropout == 0.0
    )


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> AttentionState:
    bias = additive(as_4d(mask), query.dtype)
    return _forward(query, key, value, 0.0, causal and bias is None, attn_mask=bias, scale=scale)  # type: ignore[misc]


class CPUTwoPartAttention(torch.autograd.Function):
    """One softmax over [memory | causal local]; differentiable in both queries, key, value and bias.

    Not in memory, which is never trained: the fused backward pass over [memory | local] would compute gradients of
    retrieved keys and values as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        memory_query: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        memory_bias: Tensor | None,
        local_bias: Tensor | None,
        memory_mask: Tensor | None,
        near_key: Tensor | None,
        near_value: Tensor | None,
        near_mask: Tensor | None,
        scale: float,
        choice: Choice | None,
    ) -> tuple[Tensor, Tensor]:
        """Output and mass on memory.

        Arguments as for ``retrieval_causal_attention``, the local mask additive; ``memory_query`` (B, H, t, D) is that
        of the last t tokens, those before them read no memory. ``near_key`` and what follows it: more memory, read with
        ``query``.
        """
        local = _fused(query, key, value, local_bias, is_causal(query, key, local_bias), scale)
        seen = None if memory_mask is None else seen_and_filled(memory_mask)
        kept: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> AttentionState:
            if choice is None:
                return _fused(q, k, v, mask, causal, scale)
            output, lse, read = attend_chosen(q, k, v, additive(as_4d(mask), torch.float32), scale, choice)
            kept.append(read)
            return output, lse

        memory = attend_to_memory(attend, memory_query, memory_key, memory_value, seen, memory_bias)
        if near_key is not None and near_value is not None:
            seen = None if near_mask is None else seen_and_filled(near_mask)
            reading = query[:, :, query.shape[2] - memory_query.shape[2] :]
            own = attend_to_memory(
                lambda q, k, v, mask, causal: _fused(q, k, v, mask, causal, scale), reading, near_key, near_value, seen
            )
            memory = merge_memory(memory, own)
        output, mass, lse = merge_attention_states(local, memory)
        ctx.save_for_backward(
            query, key, value, memory_query, memory_key, memory_value, memory_bias, local_bias, memory_mask, near_key,
            near_value, near_mask, output, lse, *kept,
        )  # fmt: skip
        ctx.scale = scale
        ctx.mark_non_differentiable(mass)
        return output, mass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The flash backward pass, given the merged output and log-sum-exp, yields each part's exact share."""
        grad = grad_outputs[0]
        saved = ctx.saved_tensors  # asked for once: under checkpointing it may not be again
        query, key, value, reading, memory_key, memory_value, bias, local_bias, mask = saved[:9]
        near_key, near_value, near_mask, output, lse = saved[9:14]
        read = saved[14] if len(saved) > 14 else None
        local = _backward(  # type: ignore[misc]
            grad, query, key, value, output, lse, 0.0, is_causal(query, key, local_bias), attn_mask=local_bias,
            scale=ctx.scale,
        )  # fmt: skip
        groups, begin = len(memory_key) // len(query), query.shape[2] - reading.shape[2]
        delta = (grad.float() * output.float()).sum(-1)
        grad, delta, lse = (fold(t[:, :, begin:], groups) for t in (grad, delta, lse))
        without_bias = lse if bias is None else lse - bias[..., None]
        of_reading, of_bias = memory_gradient(
            grad, fold(reading, groups), delta, without_bias, memory_key, memory_value, mask, read, ctx.scale
        )
        if near_key is not None:
            own = fold(query[:, :, begin:], groups)
            of_own, _ = memory_gradient(grad, own, delta, lse, near_key, near_value, near_mask, None, ctx.scale)
            local[0][:, :, begin:] += unfold(of_own, groups)
        own_bias = None if bias is None else of_bias.sum(0) if bias.dim() == 1 else of_bias
        return *local, unfold(of_reading, groups), None, None, own_bias, *[None] * 7


def memory_gradient(
    grad: Tensor,
    query: Tensor,
    delta: Tensor,
    lse: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_mask: Tensor | None,
    kept: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The memory part's gradients of the queries (R, H, T, D) and of a number added to each head's scores (R, H).

    Head by head so that scores stay in cache; in float32. With P = exp(q K^T - lse), dP = dO V^T and
    delta = rowsum(dO * O), the gradient of scores is dS = P * (dP - delta), so dQ = dS K. ``kept`` (R, H, T, n): chunks
    that were read; None: all.
    """
    result = torch.zeros_like(query)
    of_bias = query.new_zeros(query.shape[:2], dtype=torch.float32)
    group = query.shape[1] // memory_key.shape[1]
    for row in range(query.shape[0]):
        real = slice(None) if memory_mask is None else memory_mask[row].nonzero().flatten()
        for head in range(query.shape[1]):
            keys, values = (t[row, head // group, real].float() for t in (memory_key, memory_value))
            q, g = query[row, head].float(), grad[row, head].float()
            scores = torch.addmm(lse[row, head][:, None], q, keys.T, beta=-1, alpha=scale).exp_()
            scores.mul_(torch.addmm(delta[row, head][:, None], g, values.T, beta=-1))
            if kept is not None:
                size = memory_key.shape[2] // kept.shape[3]
                scores.mul_(kept[row, head].repeat_interleave(size, dim=1)[:, real])
            of_bias[row, head] = scores.sum()
            result[row, head] = torch.mm(scores, keys).mul_(scale)
    return result, of_bias
