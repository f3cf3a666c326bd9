"""Which layer should store memory, and which should read it: every combination scored without training."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from lightning_memlong.backbone import layer_index, spans, text_config, unlimited_layers
from lightning_memlong.config import SOURCES, LayerIndex, ModelConfig, TuningConfig, require_choice
from lightning_memlong.memlong import MemLong

READERS = ("above", "every", "spread", "own")
"""Which layers read, given the memory layer: it and all ``above`` that see the whole context; ``every`` one, sliding
windows included; four ``spread`` evenly from it to the top, as the paper's 13, 17, 21, 25 of 26; its ``own``."""


@dataclass(frozen=True)
class LayerChoice:
    """Which layers store memory and which read it."""

    memory_layer: int
    readers: str
    """Name of the choice of retrieval layers."""
    retrieval_layers: tuple[int, ...]
    source: str

    @property
    def layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers that are stored and layers that read: choices with the same ones are the same model."""
        # Of per_layer, only the layers that read matter, not which of them is called the memory layer.
        stored = (self.memory_layer,) if self.source == "single" else self.retrieval_layers
        return stored, self.retrieval_layers


def retrieval_layers(readers: str, memory_layer: int, count: int, whole: Sequence[int]) -> tuple[int, ...]:
    """The layers a name of :data:`READERS` stands for; ``whole``: those that see the whole context."""
    if readers == "own":
        return (memory_layer,)
    above = tuple(range(memory_layer, count))
    if readers == "every":
        return above
    if readers == "spread":
        step = (count - memory_layer) / 4
        return tuple(sorted({memory_layer + int(i * step) for i in range(4)}))
    return tuple(layer for layer in above if layer in whole)


def layer_grid(
    memory_layers: Sequence[LayerIndex], readers: Sequence[str], sources: Sequence[str], backbone: PreTrainedModel
) -> list[LayerChoice]:
    """Every combination; ``every`` is left out of a backbone all whose layers see the whole context.

    Raises:
        UserError: For a layer that is not there, or an unknown name.
    """
    config = text_config(backbone)
    count = config.num_hidden_layers
    whole = unlimited_layers(getattr(config, "layer_types", None), count)
    for name in readers:
        require_choice("readers", name, READERS)
    for name in sources:
        require_choice("sources", name, SOURCES)
    if len(whole) == count and "above" in readers:
        readers = [name for name in readers if name != "every"]
    choices = []
    for value in memory_layers:
        memory = layer_index("memory_layers", value, count, list(memory_layers))
        for source, name in itertools.product(sources, readers):
            layers = retrieval_layers(name, memory, count, whole)
            if layers:
                choices.append(LayerChoice(memory, name, layers, source))
    return choices


def sweep_layers(
    backbone: PreTrainedModel,
    choices: Sequence[LayerChoice],
    score: Callable[[MemLong], float],
    settings: ModelConfig,
    bos: int | None = None,
) -> Iterator[tuple[LayerChoice, float]]:
    """Score the untrained backbone with each combination of layers, with joint fusion: untrained gates are closed.

    Args:
        backbone: Is wrapped anew for each set of layers, and given back untouched.
        choices: What to try.
        score: Scores a wrapped model, for instance by its perplexity.
        settings: How memory is read; layers and source aside.
        bos: As for :class:`MemLong`.

    Yields:
        Each choice and its score, as soon as it is known.
    """
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    nothing = TuningConfig(mode="none")
    for choice in choices:
        if choice.layers not in known:
            # The source is a text here, and was checked when the grid was made.
            where = {"memory_layer": choice.memory_layer, "retrieval_layers": list(choice.retrieval_layers)}
            config = replace(settings, source=choice.source, **where)  # type: ignore[arg-type]
            model = MemLong(backbone, config, tuning=nothing, bos=bos)
            try:
                known[choice.layers] = score(model)
            finally:
                model.unwrap()
        yield choice, known[choice.layers]


def layer_table(scores: dict[LayerChoice, float], off: float) -> list[dict[str, object]]:
    """Rows for a file: the choice, perplexity with memory, and that by perplexity without."""
    return [
        {
            "memory_layer": choice.memory_layer,
            "readers": choice.readers,
            "retrieval_layers": spans(list(choice.retrieval_layers)),
            "source": choice.source,
            "perplexity": round(value, 4),
            "perplexity_memory_off": round(off, 4),
            "ratio": round(value / off, 5),
        }
        for choice, value in scores.items()
    ]
