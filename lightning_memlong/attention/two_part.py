"""One softmax over [memory | causal local] by a fused kernel that is called for each part.

Legend: B rows, G groups, H query heads, H_kv key/value heads, T local tokens, t of them that read memory, M retrieved
tokens, n chunks of them, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.attention.choice import Choice, attend_chosen
from lightning_memlong.attention.kernels import (
    Attend,
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

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """What the backward pass of one part of a merged attention is given; R rows, G times B where they are folded."""

    grad: Tensor
    """(R, H, T, D), of the merged output."""
    query: Tensor
    """(R, H, T, D)."""
    key: Tensor
    """(R, H_kv, S, D), of S tokens that are attended to."""
    value: Tensor
    """Shaped as ``key``."""
    output: Tensor
    """(R, H, T, D), merged."""
    lse: Tensor
    """(R, H, T), merged, less what was added to all scores of the part."""
    scale: float


@dataclass(frozen=True)
class FusedKernel:
    """A fused kernel that tells its log-sum-exp, and whose backward pass can be given another.

    Given the merged output and log-sum-exp, the flash backward pass yields each part's exact share.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], AttentionState]
    """Of query, key, value, a mask (true or additive), causality and scale."""
    gradient: Callable[[Part, Tensor | None, bool], Gradients]
    """Of a part's query, key and value, given its mask, additive, and causality."""
    query_gradient: Callable[[Part, Tensor | None, Tensor | None], Tensor]
    """Of a part's query alone, as memory is never trained, given which tokens of a row are real (R, M), and which
    chunks were read (R, H, T, n); None: all."""


class TwoPartAttention(torch.autograd.Function):
    """One softmax over [memory | causal local]; differentiable in both queries, key, value and bias, not in memory."""

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
        kernel: FusedKernel,
    ) -> tuple[Tensor, Tensor]:
        """Output and mass on memory.

        Arguments as for ``retrieval_causal_attention``, the local mask additive; ``memory_query`` (B, H, t, D) is that
        of the last t tokens, those before them read no memory. ``near_key`` and what follows it: more memory, read with
        ``query``.
        """

        def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> AttentionState:
            return kernel.attend(q, k, v, mask, causal, scale)

        kept: list[Tensor] = []
        local = plain(query, key, value, local_bias, is_causal(query, key, local_bias))
        seen = None if memory_mask is None else seen_and_filled(memory_mask)
        way = plain if choice is None else _choosing(choice, scale, kept)
        memory = far = attend_to_memory(way, memory_query, memory_key, memory_value, seen, memory_bias)
        if near_key is not None and near_value is not None:
            seen = None if near_mask is None else seen_and_filled(near_mask)
            reading = query[:, :, query.shape[2] - memory_query.shape[2] :]
            memory = merge_memory(memory, attend_to_memory(plain, reading, near_key, near_value, seen))
        output, mass, lse = merge_attention_states(local, memory)
        of_bias = far if ctx.needs_input_grad[6] else (None, None)
        ctx.save_for_backward(
            query, key, value, memory_query, memory_key, memory_value, memory_bias, local_bias, memory_mask, near_key,
            near_value, near_mask, output, lse, *of_bias, *kept,
        )  # fmt: skip
        ctx.scale, ctx.kernel = scale, kernel
        ctx.mark_non_differentiable(mass)
        return output, mass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Each part's share of the gradients."""
        grad, kernel = grad_outputs[0], ctx.kernel
        saved = ctx.saved_tensors  # asked for once: under checkpointing it may not be again
        query, key, value, reading, memory_key, memory_value, bias, local_bias, mask = saved[:9]
        near_key, near_value, near_mask, output, lse, far_output, far_lse = saved[9:16]
        read = saved[16] if len(saved) > 16 else None
        causal = is_causal(query, key, local_bias)
        local = kernel.gradient(Part(grad, query, key, value, output, lse, ctx.scale), local_bias, causal)
        groups, begin = len(memory_key) // len(query), query.shape[2] - reading.shape[2]
        grad, output, lse = (t[:, :, begin:] for t in (grad, output, lse))
        of_bias = None
        if far_output is not None:
            of_bias = _of_bias(grad, output, lse, far_output, far_lse, bias, groups)
        grad, output, lse = (fold(t, groups) for t in (grad, output, lse))
        without_bias = lse if bias is None else lse - bias[..., None]
        far = Part(grad, fold(reading, groups), memory_key, memory_value, output, without_bias, ctx.scale)
        of_reading = kernel.query_gradient(far, mask, read)
        if near_key is not None:
            own = fold(query[:, :, begin:], groups)
            near = Part(grad, own, near_key, near_value, output, lse, ctx.scale)
            local[0][:, :, begin:] += unfold(kernel.query_gradient(near, near_mask, None), groups)
        return *local, unfold(of_reading, groups), None, None, of_bias, *[None] * 8


def _choosing(choice: Choice, scale: float, kept: list[Tensor]) -> Attend:
    """Attention of queries to the chunks they choose; what they read is left in ``kept``."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> AttentionState:
        output, lse, read = attend_chosen(q, k, v, additive(as_4d(mask), torch.float32), scale, choice)
        kept.append(read)
        return output, lse

    return attend


def _of_bias(
    grad: Tensor, output: Tensor, lse: Tensor, far_output: Tensor, far_lse: Tensor, bias: Tensor, groups: int
) -> Tensor:
    """The gradient of a number that is added to each head's scores in memory: that of all its scores together.

    With P the weights, dP = dO V^T and delta = rowsum(dO * O), that of scores is P * (dP - delta). In memory P sums to
    its mass m, and P dP to m dO O_memory; so it is m (dO O_memory - delta), summed over tokens.
    """
    grad = grad.float()
    of_tokens = (far_lse - lse).exp() * (grad * (far_output.float() - output.float())).sum(-1)
    of_rows = fold(of_tokens, groups).sum(-1)
    return of_rows.sum(0) if bias.dim() == 1 else of_rows
