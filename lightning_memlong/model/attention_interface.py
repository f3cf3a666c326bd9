"""How retrieved memory reaches attention: an argument of the forward pass, and a function known to transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from lightning_memlong.attention import (
    Scores,
    attend_with_memory,
    chunk_shares,
    compute_dtype,
    local_attention,
)
from lightning_memlong.model.context import ForwardContext, StopForward

ATTENTION_NAME = "memlong"
_sdpa = AttentionInterface()["sdpa"]


def decode(backbone: PreTrainedModel, input_ids: Tensor, context: ForwardContext, cache: Cache | None = None) -> Tensor:
    """Last hidden states (B, T, E); with a cache, of tokens that follow those in it."""
    decoder = backbone.get_decoder()
    context.begin = 0 if cache is None else int(cache.get_seq_length())
    return decoder(
        input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, memory=context
    ).last_hidden_state


@torch.compiler.disable
def memory_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    memory: ForwardContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls in every layer; plain attention where there is no memory to read.

    Raises:
        StopForward: In the layer where the pass is to end.
        ValueError: For a backbone that adds something to the softmax that plain attention does not have.
    """
    beyond = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if beyond:
        raise ValueError(f"attention with {', '.join(beyond)} cannot be joined with memory")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    context = memory or ForwardContext()
    if layer in context.capture_layers:
        context.captured[layer] = (key.detach(), value.detach())
    if layer == context.stop_at_layer:
        raise StopForward
    if layer not in context.memory_kv and softcap is None:
        return _sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    # Under autocast, rotated queries may be float32 beside bfloat16 values.
    query, key, value = (t.to(compute_dtype(t)) for t in (query, key, value))
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, dropout)
    if layer not in context.memory_kv:
        output = local_attention(query, key, value, attention_mask, scores, context.backend, context.memo)
        return output.transpose(1, 2).contiguous(), None
    retrieved = context.retrieved(layer, query)
    output, mass = attend_with_memory(
        query, key, value, retrieved, attention_mask, scores, context.backend, context.memo
    )
    if mass is not None:
        context.memory_mass[layer] = mass.mean(-1)
    if context.readers is not None and layer not in context.layer_use:  # checkpointing runs a layer again
        shares = chunk_shares(query, key, retrieved, mass, attention_mask, scores, context.readers)
        context.layer_use[layer] = shares.mean((1, 2))
    if (watch := context.watch) is not None:
        watch.note(layer, chunk_shares(query, key, retrieved, mass, attention_mask, scores, watch.readers))
    return output.transpose(1, 2).contiguous(), None


def register_attention() -> str:
    """Register the function with transformers (idempotent) and return its name."""
    AttentionInterface.register(ATTENTION_NAME, memory_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, AttentionMaskInterface()["sdpa"])
    return ATTENTION_NAME
