"""Which tokens count in training: LongCE (arXiv 2410.23771) weighs them by what far text is worth to them."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_memlong.config import require
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import MemLongOutput
from lightning_memlong.text import Batch

LossWeights = Literal["none", "long_context"]
CEILING = 5.0
"""Largest weight of a token (LongCE)."""


class Scored(NamedTuple):
    """A training window that was read, and what it costs."""

    output: MemLongOutput
    loss: Tensor
    """What is minimised: the mean over scored tokens, weighted or not."""
    means: dict[str, Tensor]
    """Means over scored tokens to be logged, detached: ``loss``, unweighted, first; ``loss_weight`` if there is one."""


def require_memory(there: bool) -> None:
    """Weights that come from memory need one.

    Raises:
        UserError: If there is none.
    """
    allowed = "none where there is no memory that could help (memory.enabled false)"
    require(there, "model.loss_weights", "long_context", allowed, "leave it out, or memory.enabled")


def plain_loss(model: MemLong, batch: Batch) -> Scored:
    """Each scored token counts the same."""
    output = model(batch["input_ids"], batch["labels"], memory=batch.get("memory"))
    assert output.loss is not None
    return Scored(output, output.loss, {"loss": output.loss.detach()})


def long_context_loss(model: MemLong, batch: Batch, sharded: bool = False) -> Scored:
    """Each scored token counts by :func:`long_context_weights`; the same for all where nothing was retrieved.

    The weighted sum is divided by the number of scored tokens and not by the sum of weights: a token that far text does
    not help counts 1 in whichever row of the batch it lies, and one that it helps counts more than all of those.
    Divided by their sum, a window full of tokens that need far text would count no more than any other. (Accumulated
    batches and processes count alike however many tokens they score, as Lightning averages them; with plain loss too.)

    Args:
        model: The network, which reads the window twice: without memory first, and without gradients.
        batch: Window, with what was retrieved for it.
        sharded: Whether the weights are spread over processes, which then have to go through the model together,
            whatever each of them retrieved.
    """
    require_memory("memory" in batch)
    memory, ids, labels = batch["memory"], batch["input_ids"], batch["labels"]
    nothing = memory is None or memory.empty
    off = None if nothing and not sharded else _losses_without_memory(model, ids, labels)
    if off is None or nothing:
        scored = plain_loss(model, batch)
        return scored._replace(means=scored.means | {"loss_weight": torch.ones_like(scored.loss)})
    output = model(ids, memory=memory)
    on = model.head.loss(output.hidden, labels, reduction="none")
    weights, count = long_context_weights(off, on), (labels[:, 1:] != -100).sum().clamp(min=1)
    means = {"loss": on.sum() / count, "loss_weight": (weights * (labels != -100))[:, 1:].sum() / count}
    return Scored(output, model.head.loss(output.hidden, labels, weights=weights), means)


def long_context_weights(off: Tensor, on: Tensor) -> Tensor:
    """min(exp(off - on), 5) of losses without memory and with it (LongCE)."""
    return (off - on).exp().clamp(max=CEILING)


def _losses_without_memory(model: MemLong, ids: Tensor, labels: Tensor) -> Tensor:
    """(B, T), in the mode the model is in; the pass that follows drops out the same units."""
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        losses = model.head.loss(model(ids).hidden, labels, reduction="none")
    # Before pytorch/pytorch#165068 autocast gave casts made here, which know no gradient, to the pass that follows.
    torch.clear_autocast_cache()
    return losses
