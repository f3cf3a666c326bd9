"""A backbone's rotary positions stretched to texts longer than it was trained on, by transformers' own formulas."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from transformers import PreTrainedModel

from lightning_memlong.backbone.layers import text_config
from lightning_memlong.backbone.transformers_private import rotary_parts, settle_dynamic
from lightning_memlong.config import require

Stretch = Literal["yarn", "dynamic"]
"""YaRN (arXiv 2309.00071), or NTK-aware scaling that grows with the text (dynamic NTK)."""


def check_stretch(backbone: PreTrainedModel, key: str, kind: str) -> None:
    """Whether a backbone's positions can be stretched.

    Args:
        backbone: Whose positions.
        key: The setting that asks for it, for messages.
        kind: What was given there.

    Raises:
        UserError: If they are stretched already, or it does not say for how many tokens it was made.
    """
    config = text_config(backbone)
    known = getattr(config, "max_position_embeddings", None) is not None and rotary_parts(backbone) is not None
    allowed = "a backbone with rotary positions that says for how many tokens it was made"
    require(known, key, kind, allowed, "leave it out")
    types = [p.get("rope_type", "default") for p in _whole_context(config.rope_parameters)]
    allowed = f"a backbone whose positions are not stretched yet; those of this one are: {', '.join(types)}"
    require(set(types) == {"default"}, key, kind, allowed, "leave it out")


def _whole_context(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of layers that see the whole context; where each type of layer has a table, the others look at near tokens."""
    if not _by_type(parameters):
        return [dict(parameters)]
    return [dict(p) for name, p in parameters.items() if name != "sliding_attention" and p]


def _by_type(parameters: Mapping[str, Any]) -> bool:
    """Whether each type of layer has parameters of its own."""
    return "rope_type" not in parameters and "rope_theta" not in parameters


@contextmanager
def stretched(backbone: PreTrainedModel, kind: Stretch, tokens: int) -> Iterator[None]:
    """The backbone with its rotary tables stretched to so many tokens; afterwards as it was.

    YaRN's factor is tokens by those it was made for. Dynamic NTK's base is that of so many tokens from the beginning:
    left to follow the text, it would change under keys that lie in a cache.
    """
    decoder, config = backbone.get_decoder(), copy.deepcopy(text_config(backbone))
    made_for = config.max_position_embeddings
    more: dict[str, Any] = {"rope_type": kind, "factor": 1.0}
    if kind == "yarn":
        more |= {"factor": max(1.0, tokens / made_for), "original_max_position_embeddings": made_for}
    given = config.rope_parameters
    config.rope_parameters = (
        {name: {**p, **more} if name != "sliding_attention" and p else p for name, p in given.items()}
        if _by_type(given)
        else {**given, **more}
    )
    was = decoder.rotary_emb
    decoder.rotary_emb = type(was)(config=config).to(backbone.device)
    if kind == "dynamic":
        settle_dynamic(decoder.rotary_emb, tokens)
    try:
        yield
    finally:
        decoder.rotary_emb = was
