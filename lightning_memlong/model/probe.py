"""Whether a backbone can be given a memory: tried on a few tokens when it is wrapped, whatever its architecture."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from lightning_memlong.backbone import Head, Rotary, text_config
from lightning_memlong.model.attention_interface import decode, register_attention
from lightning_memlong.model.context import ForwardContext

TOKENS = 32


@torch.no_grad()
def probe(backbone: PreTrainedModel, rotary: Rotary, head: Head, wanted: Iterable[int]) -> str | None:
    """Switch a backbone's attention and say what is wrong with it, if anything.

    Of different tokens, logits must stay what they were. Of one token again and again, the same hidden state stands
    at each position of every layer, so unrotated keys must be equal. Every layer must get the argument.

    Args:
        backbone: The decoder, in evaluation mode.
        rotary: Learns which layer has which table.
        head: Makes logits.
        wanted: Layers that will store or read.
    """
    wanted, config = set(wanted), text_config(backbone)
    weight = next(backbone.parameters())
    count = min(TOKENS, config.vocab_size)
    ids = torch.stack([torch.arange(count), torch.ones(count, dtype=torch.long)]).to(weight.device)
    plain = backbone(input_ids=ids, use_cache=False).logits.float()
    backbone.set_attn_implementation(register_attention())
    every = frozenset(range(config.num_hidden_layers))  # a cache of all layers is turned when text leaves it
    context = ForwardContext(capture_layers=every)
    wrapped = head.logits(decode(backbone, ids, context)).float()
    if not wanted <= set(context.captured):
        return "its attention does not receive the memory argument"
    difference = float((plain - wrapped).abs().max() / plain.abs().max().clamp(min=1e-6))
    if not difference < (1e-3 if weight.dtype == torch.float32 else 0.1):
        return (
            "it computes something that plain attention with memory cannot, such as sinks or position biases "
            f"(logits differ by {difference:.1%})"
        )
    if not wanted <= rotary.recognise({i: keys[1:] for i, (keys, _) in context.captured.items()}):
        return "its keys cannot be rotated back by its rotary tables"
    return None
