"""Whether a backbone can be given a memory: tried on a few tokens when it is wrapped, whatever its architecture."""

from typing import TYPE_CHECKING

import torch

from lightning_memlong.model.attention_interface import CarriedMemory, register_attention

if TYPE_CHECKING:
    from lightning_memlong.model.model import MemLong

TOKENS = 32


@torch.no_grad()
def probe(model: "MemLong") -> str | None:
    """Switch a model's attention and say what is wrong with its backbone, if anything.

    Of different tokens, logits must stay what they were. Of one token again and again, the same hidden state stands
    at each position of every layer, so unrotated keys must be equal. Every layer must get the argument.
    """
    weight = next(model.backbone.parameters())
    count = min(TOKENS, model.config.vocab_size)
    ids = torch.stack([torch.arange(count), torch.ones(count, dtype=torch.long)]).to(weight.device)
    plain = model.backbone(input_ids=ids, use_cache=False).logits.float()
    model.backbone.set_attn_implementation(register_attention())
    wanted = {*model.stored_layers, *model.retrieval_layers}
    every = frozenset(range(model.config.num_hidden_layers))  # a cache of all layers is turned when text leaves it
    carried = CarriedMemory(capture=every)
    wrapped = model.head.logits(model.decode(ids, carried)).float()
    if not wanted <= set(carried.captured):
        return "its attention does not receive the memory argument"
    difference = float((plain - wrapped).abs().max() / plain.abs().max().clamp(min=1e-6))
    if not difference < (1e-3 if weight.dtype == torch.float32 else 0.1):
        return (
            "it computes something that plain attention with memory cannot, such as sinks or position biases "
            f"(logits differ by {difference:.1%})"
        )
    if not wanted <= model.rotary.recognise({i: keys[1:] for i, (keys, _) in carried.captured.items()}):
        return "its keys cannot be rotated back by its rotary tables"
    return None
