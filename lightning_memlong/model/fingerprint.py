"""What a bank's keys and values were computed with, as a short name."""

import hashlib
from typing import Any


def weights_digest(model: Any) -> str:
    """A digest of the weights that make what a :class:`MemLong` stores: some numbers of each, in layers up to the last.

    Args:
        model: Whose backbone; adapters count as they are.
    """
    decoder = model.backbone.get_decoder()
    parts = [decoder.embed_tokens, *decoder.layers[: model.stored_layers[-1] + 1]]
    digest = hashlib.blake2b(f"{model.bos}".encode(), digest_size=8)
    for part in parts:
        for name, weight in part.named_parameters():
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 64)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(some.numpy().tobytes())
    return f"{model.backbone.config.model_type} {digest.hexdigest()}"
