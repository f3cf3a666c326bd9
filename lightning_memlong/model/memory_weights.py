"""What a backbone has learned of reading memory, apart from its weights: a few numbers a retrieval layer and head.

A file of a few kB holds the numbers, what backbone they belong to and with which settings they were learned. A backbone
that was exported has its own beside its weights.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightning_memlong.backbone import file_beside, layer_index, text_config
from lightning_memlong.config import ModelConfig, require
from lightning_memlong.errors import UserError

log = logging.getLogger(__name__)

MEMORY_WEIGHTS_FILE = "memory.safetensors"
SHIPPED = Path(__file__).parent / "weights"
"""Files that come with the project; docs/results.md has the command that made each."""
SCALE = "scale."
"""Begins the names of scales in a file; biases are called by their layers alone."""
KEY, LAYERS = "model.memory_weights", "model.retrieval_layers"


def recognise_backbone(backbone: PreTrainedModel) -> dict[str, Any]:
    """What a frozen backbone is recognised by: its shape and a sum over its embeddings, before any cast."""
    embedding: Tensor = backbone.get_input_embeddings().weight  # type: ignore[assignment]  # typed as any attribute
    return _shape(backbone) | {"embedding_sum": round(float(embedding.detach().double().abs().sum()), 1)}


def _shape(backbone: PreTrainedModel) -> dict[str, Any]:
    config = text_config(backbone)
    return {k: getattr(config, k) for k in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")}


def _held(model: Any) -> dict[str, Any]:
    """Settings of the network that the numbers were learned with."""
    names = ("position", "memory_distance", "memory_near", "memory_reference", "source", "memory_layer")
    return {name: getattr(model.layout, name) for name in names}


def save_memory_weights(model: Any, file: str | Path, memory: Mapping[str, Any] | None = None) -> Path:
    """Write a model's numbers.

    Args:
        model: The model.
        file: Where to.
        memory: Settings of the memory group they were learned with, if known.

    Raises:
        UserError: If it cannot be written.
    """
    backbone = recognise_backbone(model.backbone)
    facts = {
        "name": model.name, "backbone": json.dumps(backbone), "model": json.dumps(_held(model)),
        "memory": json.dumps({k: v for k, v in (memory or {}).items() if k in ("chunk_size", "top_k", "candidates")}),
    }  # fmt: skip
    learned = {**model.memory_bias, **{f"{SCALE}{layer}": number for layer, number in model.memory_scale.items()}}
    numbers = {name: number.detach().float().cpu().contiguous() for name, number in learned.items()}
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file(numbers, file, facts)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be written ({error}). Fix: choose a folder that can.") from error
    return Path(file)


@dataclass(frozen=True)
class LearnedReading:
    """Numbers learned before, and what they were learned with."""

    source: str
    """Where they are from, for messages."""
    biases: Mapping[str, Tensor]
    """Layer, as a string -> (H,) float32."""
    scales: Mapping[str, Tensor]
    """The same, logarithms of factors; none where none were learned."""
    facts: Mapping[str, Any]
    """``name`` and ``backbone`` they belong to, settings of ``model`` and ``memory`` they were learned with."""
    shipped: bool = False
    """Whether they come with the project; then other layers than theirs begin with 0."""
    asked_for: bool = False
    """Whether somebody named the file; then it is told where settings differ."""

    def best_layers(self, count: int) -> list[int]:
        """The layers whose heads read most of memory: those with the highest mean."""
        require(count <= len(self.biases), LAYERS, count, f"1 to {len(self.biases)} layers", "ask for fewer")
        order = sorted(self.biases, key=lambda layer: -float(self.biases[layer].mean()))
        return sorted(map(int, order[:count]))


def find_memory_weights(name: str, backbone: PreTrainedModel, chosen: ModelConfig) -> LearnedReading | None:
    """Numbers learned before, as ``model.memory_weights`` says.

    Args:
        name: The backbone's, a folder if it lies in one.
        backbone: The backbone, as it was loaded.
        chosen: ``auto`` takes those in the backbone's own folder, else those that come with the project, if they were
            learned with this position and source.

    Raises:
        UserError: If a file cannot be read, or belongs to another backbone.
    """
    wanted = chosen.memory_weights
    if wanted is None or not chosen.memory_bias or chosen.fusion != "joint":
        return None
    if wanted == "auto":
        # Exported beside its backbone, whose tuned weights are not those it was recognised by.
        beside = file_beside(name, MEMORY_WEIGHTS_FILE)
        return _shipped(backbone, chosen) if beside is None else _read(beside)
    found = replace(_read(Path(wanted)), asked_for=True)
    allowed, fix = f"a file for this backbone ({name})", "learn them with conf/recipes/calibrate.yaml"
    mine = found.facts["backbone"] == recognise_backbone(backbone)
    require(mine, KEY, f"{wanted} ({found.facts['name']})", allowed, fix)
    return found


def _shipped(backbone: PreTrainedModel, chosen: ModelConfig) -> LearnedReading | None:
    """Those that come with the project: learned with this memory layer, or the next below there is, else above."""
    shape, wanted = _shape(backbone), {name: getattr(chosen, name) for name in ("position", "source")}
    recognised = cache(lambda: recognise_backbone(backbone))  # a sum over all embeddings: once, and for few backbones
    fit: dict[int, LearnedReading] = {}
    for file in sorted(SHIPPED.glob("*.safetensors")):
        found = _read(file)
        held, its = found.facts["model"], found.facts["backbone"]
        if wanted.items() <= held.items() and shape.items() <= its.items() and recognised() == its:
            fit[held["memory_layer"]] = replace(found, shipped=True)
    layer = layer_index("model.memory_layer", chosen.memory_layer, shape["num_hidden_layers"])
    below = [there for there in fit if there <= layer]
    return fit[max(below) if below else min(fit)] if fit else None


def take_memory_weights(model: Any, found: LearnedReading) -> None:
    """Begin with numbers learned before; if somebody asked for them, the model's ``calibrated`` says how they were.

    Args:
        model: Its layers are among those that the numbers are of.
        found: The numbers.

    Raises:
        UserError: If they are of other layers.
    """
    here, there = sorted(map(int, model.memory_bias)), sorted(map(int, found.biases))
    fix = "learn them with conf/recipes/calibrate.yaml"
    known = found.shipped or set(here) <= set(there)
    require(known, KEY, f"{found.source} (layers {there})", f"a file for model.retrieval_layers {here}", fix)
    for name, value in _held(model).items():
        if found.asked_for and found.facts["model"].get(name) != value:
            was = found.facts["model"].get(name)
            log.warning("%s was learned with model.%s=%s, which is %s here", KEY, name, was, value)
    for own, learned in ((model.memory_bias, found.biases), (model.memory_scale, found.scales)):
        for layer in own.keys() & learned.keys():
            ok, allowed = learned[layer].shape == own[layer].shape, f"{len(own[layer])} heads in layer {layer}"
            require(ok, KEY, f"{len(learned[layer])} heads", allowed, "give a file for this backbone")
            own[layer].data.copy_(learned[layer])
    model.calibrated = found.facts if found.asked_for else {}


def warn_of_other_memory(model: Any, memory: Any) -> None:
    """Say where the memory is not as it was when a file's numbers were learned.

    Args:
        model: The model.
        memory: A :class:`MemoryConfig`.
    """
    for name, value in model.calibrated.get("memory", {}).items():
        if value != getattr(memory, name):
            log.warning("%s was learned with memory.%s=%s, which is %s here", KEY, name, value, getattr(memory, name))


def _read(file: Path) -> LearnedReading:
    try:
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            found = dict(opened.metadata() or {})
            facts = {k: v if k == "name" else json.loads(v) for k, v in found.items()}
            numbers = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
            if not {"name", "backbone", "model", "memory"} <= set(facts):
                raise ValueError("it says nothing of a backbone")
        biases = {name: number for name, number in numbers.items() if not name.startswith(SCALE)}
        scales = {name.removeprefix(SCALE): number for name, number in numbers.items() if name.startswith(SCALE)}
        return LearnedReading(str(file), biases, scales, facts)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{KEY}={str(file)!r} cannot be read ({str(error).splitlines()[0]}). Allowed: auto, null, or a file "
            "written by conf/recipes/calibrate.yaml. Fix: correct the path, or learn them again."
        ) from error
