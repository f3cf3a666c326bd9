"""From a decoder's last hidden states to logits and losses, without float32 logits of a whole window.

Legend: N scored positions, E hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_memlong.attention import compute_dtype
from lightning_memlong.backbone.layers import text_config
from lightning_memlong.backbone.transformers_private import logits_shape

LOGITS_AT_ONCE = 2**24
"""Float32 logits that exist at a time while a loss is computed: 64 MB."""


class Head:
    """A backbone's output head, with what families do to logits: scaling (Granite) and soft-capping (Gemma 2).

    Whether that is all a backbone does is proved by :class:`lightning_memlong.model.model.MemLong` when it is wrapped.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        self._backbone = backbone
        self.divisor, self.softcap = logits_shape(text_config(backbone))

    @property
    def linear(self) -> nn.Linear:
        """The projection to the vocabulary."""
        return self._backbone.get_output_embeddings()  # type: ignore[return-value]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E) to (..., V)."""
        return _shape_logits(self.linear(hidden), self.divisor, self.softcap)

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str = "mean", weights: Tensor | None = None) -> Tensor:
        """Next-token cross-entropy in float32, a block of positions at a time.

        Args:
            hidden: (B, T, E).
            labels: (B, T), aligned with the inputs, -100 where not scored. The first token of a window has nothing to
                be predicted from and is never scored.
            reduction: ``mean`` over scored tokens, 0 where there is none; or ``none``: (B, T), 0 where not scored,
                without gradients.
            weights: (B, T) float32, for ``mean``: what the loss of each scored token is multiplied by; the sum is still
                divided by the number of scored tokens. None: 1.
        """
        targets = labels[:, 1:].flatten()
        places = (targets != -100).nonzero().flatten()
        scored, wanted = hidden[:, :-1].flatten(0, 1).index_select(0, places), targets[places]
        linear = self.linear
        weight, bias = (None if t is None else t.to(compute_dtype(scored)) for t in (linear.weight, linear.bias))
        if reduction == "none":
            with torch.no_grad():
                losses = _losses(scored, weight, bias, wanted, self.divisor, self.softcap)
            every = losses.new_zeros(len(targets)).index_copy_(0, places, losses)
            return F.pad(every.view(len(labels), -1), (1, 0))
        counts = None if weights is None else weights[:, 1:].flatten()[places]
        total = BlockwiseCrossEntropy.apply(
            scored, weight, bias, wanted, counts, self.divisor, self.softcap, torch.is_grad_enabled()
        )
        return total / max(1, len(places))


def _shape_logits(logits: Tensor, divisor: float, softcap: float | None) -> Tensor:
    if divisor != 1.0:
        logits = logits / divisor
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _blocks(count: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Blocks:
    """Losses of a linear head over blocks of positions; float32 logits of one block exist, in memory used again."""

    def __init__(self, weight: Tensor, bias: Tensor | None, divisor: float, softcap: float | None) -> None:
        self.weight, self.bias, self.divisor, self.softcap = weight, bias, divisor, softcap
        self._room: Tensor | None = None

    def _raw(self, hidden: Tensor) -> Tensor:
        """(n, V) in the dtype of the weights."""
        if self._room is None:  # the first block is the largest
            self._room = self.weight.new_empty(len(hidden), len(self.weight))
        room = self._room[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=room)
        return torch.addmm(self.bias, hidden, self.weight.T, out=room)

    def losses(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of positions (n, E) with targets (n, 1): losses (n,), and what gradients are made of.

        Those are the numerators (n, V) and denominators (n, 1) of the softmax, and the slope of the cap (n, V) if any.

        Everything is done in place: touching fresh memory costs as much as the arithmetic.
        """
        logits = _shape_logits(self._raw(hidden), self.divisor, self.softcap).float()
        wanted = logits.gather(1, target)
        slope = None if self.softcap is None else 1 - (logits / self.softcap).square()
        top = logits.amax(-1, keepdim=True)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        return (total.log() + top - wanted)[:, 0], logits, total, slope


@torch.no_grad()
def _losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, divisor: float, softcap: float | None
) -> Tensor:
    head = _Blocks(weight, bias, divisor, softcap)
    blocks = _blocks(len(hidden), len(weight))
    parts = [head.losses(hidden[b].to(weight.dtype), targets[b][:, None])[0] for b in blocks]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class BlockwiseCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of a linear head, each with a weight of its own if wanted.

    Gradients are made in the forward pass, while logits are at hand.

    PyTorch has the same since 2.13 (``linear_cross_entropy``), without soft-capping; older ones have not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counts: Tensor | None,
        divisor: float,
        softcap: float | None,
        wanted: bool,
    ) -> Tensor:
        """Hidden (N, E), weight (V, E), targets (N,), counts (N,): the sum, float32.

        ``wanted``: whether gradients will be.
        """
        if not wanted:
            losses = _losses(hidden, weight, bias, targets, divisor, softcap)
            return (losses if counts is None else losses * counts).sum()
        needed = ctx.needs_input_grad[:3]
        grads = [torch.zeros_like(t, dtype=torch.float32) if n and t is not None else None
                 for t, n in zip((hidden, weight, bias), needed, strict=True)]  # fmt: skip
        total = hidden.new_zeros((), dtype=torch.float32)
        head = _Blocks(weight, bias, divisor, softcap)
        for block in _blocks(len(hidden), len(weight)):
            here, target = hidden[block].to(weight.dtype), targets[block][:, None]
            losses, slope, denominator, of_cap = head.losses(here, target)
            total += (losses if counts is None else losses * counts[block]).sum()
            slope.div_(denominator).scatter_add_(1, target, torch.full_like(target, -1, dtype=slope.dtype))
            if of_cap is not None:
                slope.mul_(of_cap)
            if counts is not None:
                slope.mul_(counts[block][:, None])
            slope = (slope if divisor == 1.0 else slope.div_(divisor)).to(weight.dtype)
            if grads[0] is not None:
                grads[0][block] = slope @ weight
            if grads[1] is not None:
                grads[1] += slope.T @ here
            if grads[2] is not None:
                grads[2] += slope.sum(0)
        made = [None if g is None or t is None else g.to(t.dtype)
                for g, t in zip(grads, (hidden, weight, bias), strict=True)]  # fmt: skip
        ctx.save_for_backward(*made)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass made."""
        made = (None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*made, None, None, None, None, None)
