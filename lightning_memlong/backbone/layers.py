"""Which layers: indices, or fractions of the depth, so that one setting fits backbones of any size."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from lightning_memlong.config import LayerIndex, require
from lightning_memlong.errors import UserError


def layer_index(key: str, value: LayerIndex, count: int, received: object = None) -> int:
    """The layer a setting names: an index from 0, or a fraction of the depth from 0.0 up to but not including 1.0.

    A fraction f of L layers is layer ``floor(f * L)``: 0.5 of 26 is 13, the paper's.

    Args:
        key: The setting.
        value: One layer it names.
        count: Layers of the backbone.
        received: The setting's whole value, for the message; None: ``value``.

    Raises:
        UserError: If there is no such layer.
    """
    received = value if received is None else received
    fix = f"the backbone has {count} layers, counted from 0"
    allowed = f"0..{count - 1}, or a fraction from 0.0 up to but not including 1.0"
    if isinstance(value, float) and not (value.is_integer() and value >= 1):
        require(0 <= value < 1, key, received, allowed, fix)
        return int(value * count)
    require(0 <= value < count and value == int(value), key, received, allowed, fix)
    return int(value)


def choose_layers(
    memory_layer: LayerIndex,
    retrieval_layers: Sequence[LayerIndex] | int | None,
    count: int,
    everywhere: Sequence[int],
    best: Callable[[int], list[int]] | None = None,
) -> tuple[int, list[int]]:
    """The memory layer and the retrieval layers, by index.

    Args:
        memory_layer: As in ``model.memory_layer``.
        retrieval_layers: As in ``model.retrieval_layers``; None: of ``everywhere``, the memory layer and all above.
        count: Layers of the backbone.
        everywhere: Layers that see the whole context.
        best: Names so many layers by what was learned of reading memory, where anything was.

    Raises:
        UserError: For layers out of range, none at all, or one below the memory layer.
    """
    memory = layer_index("model.memory_layer", memory_layer, count)
    key = "model.retrieval_layers"
    if retrieval_layers is None:
        layers = [layer for layer in everywhere if layer >= memory]
    elif isinstance(retrieval_layers, int):
        allowed = "indices of layers, or a number of them where model.memory_weights says which read most"
        fix = "name the layers, or learn the weights with conf/recipes/calibrate.yaml and position fixed"
        require(best is not None and retrieval_layers >= 1, key, retrieval_layers, allowed, fix)
        assert best is not None
        layers = best(retrieval_layers)
    else:
        layers = sorted({layer_index(key, layer, count, list(retrieval_layers)) for layer in retrieval_layers})
    require(bool(layers), key, retrieval_layers, "at least one layer that sees the whole context", "name one, or null")
    require(
        layers[0] >= memory,
        key,
        layers,
        f"layers from model.memory_layer={memory} up (memory cannot be read below the layer that stores it)",
        "lower --model.memory_layer or drop the layers below it",
    )
    return memory, layers


def unlimited_layers(layer_types: Sequence[str] | None, count: int) -> list[int]:
    """Layers that see the whole context; where no layer does, all of them.

    A backbone that mixes both kinds (Gemma 2 and 3) trained its sliding-window layers never to look further back.
    """
    whole = [i for i in range(count) if layer_types is None or layer_types[i] != "sliding_attention"]
    return whole or list(range(count))


def text_config(backbone: PreTrainedModel) -> Any:
    """The configuration of a backbone's decoder; of one that sees pictures too, of its language part.

    Raises:
        UserError: If it is no decoder.
    """
    config = backbone.config.get_text_config(decoder=True)
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"model.backbone: {type(backbone).__name__} does not say how many layers and heads it has. Allowed: a "
            "decoder language model. Fix: choose a text-only model."
        )
    return config
