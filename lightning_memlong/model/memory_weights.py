"""What a backbone has learned of reading memory, apart from its weights: one number for each retrieval layer and head.

A file of a few kB holds the numbers, what backbone they belong to and with which settings they were learned. A backbone
that was exported has its own beside its weights.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_memlong.config import require
from lightning_memlong.errors import UserError

log = logging.getLogger(__name__)

MEMORY_WEIGHTS_FILE = "memory.safetensors"
KEY = "model.memory_weights"


def recognise_backbone(model: Any) -> dict[str, Any]:
    """What a model's frozen backbone is recognised by: its shape and a sum over its embeddings, before any cast."""
    config = model.backbone.config
    facts = {k: getattr(config, k) for k in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")}
    embedding: Tensor = model.backbone.get_input_embeddings().weight  # type: ignore[assignment]
    return facts | {"embedding_sum": round(float(embedding.detach().double().abs().sum()), 1)}


def _held(model: Any) -> dict[str, Any]:
    """Settings of the network that the numbers were learned with."""
    return {name: getattr(model.layout, name) for name in ("position", "memory_distance", "source", "memory_layer")}


def save_memory_weights(model: Any, file: str | Path, memory: Mapping[str, Any] | None = None) -> Path:
    """Write a model's numbers.

    Args:
        model: The model.
        file: Where to.
        memory: Settings of the memory group they were learned with, if known.

    Raises:
        UserError: If it cannot be written.
    """
    facts = {
        "name": model.name, "backbone": json.dumps(recognise_backbone(model)), "model": json.dumps(_held(model)),
        "memory": json.dumps({k: v for k, v in (memory or {}).items() if k in ("chunk_size", "top_k", "candidates")}),
    }  # fmt: skip
    numbers = {layer: number.detach().float().cpu().contiguous() for layer, number in model.memory_bias.items()}
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file(numbers, file, facts)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be written ({error}). Fix: choose a folder that can.") from error
    return Path(file)


def load_memory_weights(model: Any, chosen: str | None) -> None:
    """Begin with numbers learned before.

    Args:
        model: Gets them, and what they were learned with as ``calibrated``.
        chosen: A file; ``auto``: the one in the backbone's own folder, if it was exported with one; None: none.

    Raises:
        UserError: If a file cannot be read, or belongs to another backbone or other layers.
    """
    if chosen is None or not model.layout.memory_bias:
        return
    beside = Path(model.name) / MEMORY_WEIGHTS_FILE
    if chosen == "auto" and not beside.is_file():
        return
    numbers, facts = _read(beside if chosen == "auto" else Path(chosen))
    here, there = sorted(map(int, model.memory_bias)), sorted(map(int, numbers))
    own = chosen == "auto"  # exported with its backbone, whose tuned weights are not those it was recognised by
    allowed, fix = f"a file for this backbone ({model.name})", "learn them with conf/recipes/calibrate.yaml"
    require(own or facts["backbone"] == recognise_backbone(model), KEY, f"{chosen} ({facts['name']})", allowed, fix)
    require(here == there, KEY, f"{chosen} (layers {there})", f"a file for model.retrieval_layers {here}", fix)
    for name, value in _held(model).items():
        if facts["model"].get(name) != value:
            log.warning("%s was learned with model.%s=%s, which is %s here", KEY, name, facts["model"].get(name), value)
    _take(model, numbers, facts)


def warn_of_other_memory(model: Any, memory: Any) -> None:
    """Say where the memory is not as it was when a file's numbers were learned.

    Args:
        model: The model.
        memory: A :class:`MemoryConfig`.
    """
    for name, value in model.calibrated.get("memory", {}).items():
        if value != getattr(memory, name):
            log.warning("%s was learned with memory.%s=%s, which is %s here", KEY, name, value, getattr(memory, name))


def _take(model: Any, numbers: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    for layer, number in model.memory_bias.items():
        ok, allowed = numbers[layer].shape == number.shape, f"{len(number)} heads in layer {layer}"
        require(ok, KEY, f"{len(numbers[layer])} heads", allowed, "give a file for this backbone")
        number.data.copy_(numbers[layer])
    model.calibrated = facts


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            found = dict(opened.metadata() or {})
            facts = {k: v if k == "name" else json.loads(v) for k, v in found.items()}
            numbers = {layer: opened.get_tensor(layer) for layer in opened.keys()}  # noqa: SIM118  (it is no mapping)
            if not {"name", "backbone", "model", "memory"} <= set(facts):
                raise ValueError("it says nothing of a backbone")
        return numbers, facts
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{KEY}={str(file)!r} cannot be read ({str(error).splitlines()[0]}). Allowed: auto, null, or a file "
            "written by conf/recipes/calibrate.yaml. Fix: correct the path, or learn them again."
        ) from error
