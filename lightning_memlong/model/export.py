"""Tuned models as plain Hugging Face folders, with gates and memory settings beside the weights.

folder/config.json, model.safetensors, tokenizer files   loads with transformers alone
folder/memlong.yaml                                      settings, a configuration file for the command
folder/memlong_gates.safetensors                         gates, for fusion ``gated``
folder/memory.safetensors                                each head's bias in memory, for fusion ``joint``
folder/README.md                                         the model card
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_memlong.backbone import file_beside
from lightning_memlong.config import ModelConfig, TuningConfig, require
from lightning_memlong.errors import UserError
from lightning_memlong.files import write_folder
from lightning_memlong.model.card import CARD_FILE, TrainingFacts, model_card
from lightning_memlong.model.memory_weights import MEMORY_WEIGHTS_FILE, save_memory_weights

SETTINGS_FILE, GATES_FILE = "memlong.yaml", "memlong_gates.safetensors"
HEADER = (
    "# Written by `memlong export`. `--model.backbone THIS_FOLDER` takes the model's settings from here;\n"
    "# `--config THIS_FOLDER/memlong.yaml` the memory's as well.\n"
)


def export(
    model: Any,
    folder: str | Path,
    tokenizer: Any = None,
    memory: Mapping[str, Any] | None = None,
    run: TrainingFacts | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write a :class:`MemLong`, adapters merged in, whole or not at all; the model is not touched.

    Args:
        model: The model.
        folder: Where to; must not exist yet.
        tokenizer: Saved beside it, if given.
        memory: Settings of the memory group, saved beside it, if given.
        run: What the model card says of the training.
        repo_id: Where the folder will be on the hub, for the card.

    Raises:
        UserError: If the folder is there already or cannot be written.
    """
    target = Path(folder)
    require(not target.exists(), "output", str(folder), "a folder that does not exist yet", "choose another")
    settings: dict[str, Any] = {"model": model.settings()}
    settings |= {"memory": dict(memory)} if memory else {}

    def write(scratch: Path) -> None:
        model.backbone.save_pretrained(scratch, state_dict=model.tuning.merged_weights())
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        (scratch / SETTINGS_FILE).write_text(HEADER + yaml.safe_dump(settings, sort_keys=False))
        if len(model.gates):
            gates = {layer: gate.detach().cpu().contiguous() for layer, gate in model.gates.items()}
            save_file(gates, scratch / GATES_FILE)
        if len(model.memory_bias):
            save_memory_weights(model, scratch / MEMORY_WEIGHTS_FILE, memory)
        card = model_card(repo_id or target.name, model.name, model.settings(), memory or {}, run)
        (scratch / CARD_FILE).write_text(card)

    return write_folder(target, write, "output")


def exported_settings(folder: str) -> dict[str, Any] | None:
    """The model settings an exported folder was written with; None for any other backbone.

    Raises:
        UserError: If the file is damaged, or says more than that.
    """
    if (stored := _stored(folder)) is None:
        return None
    require_settings_of_a_network(stored["model"], f"{Path(folder) / SETTINGS_FILE}:")
    return dict(stored["model"])


def exported_memory(folder: str) -> dict[str, Any]:
    """The memory settings an exported folder was written with; nothing for any other backbone.

    Raises:
        UserError: If the file is damaged.
    """
    return dict((_stored(folder) or {}).get("memory") or {})


def require_settings_of_a_network(stored: dict[str, Any], whose: str) -> None:
    """See that stored settings, which a stranger may have written, are those of a network and nothing else.

    Args:
        stored: By name.
        whose: For messages.

    Raises:
        UserError: If they are not.
    """
    known = {*ModelConfig.__dataclass_fields__, "tuning", "backbone", "prepend_bos", "compare_memory_off"}
    fix = "do not use what came with it, or remove it there"
    for name, value in stored.items():
        require(name in known, f"{whose} model.{name}", value, "settings of MemLong: " + ", ".join(sorted(known)), fix)
    tuning = stored.get("tuning") or {}
    for name, value in tuning.items():
        fields = TuningConfig.__dataclass_fields__
        require(name in fields, f"{whose} model.tuning.{name}", value, "one of " + ", ".join(fields), fix)


def _stored(folder: str) -> dict[str, Any] | None:
    if (file := file_beside(folder, SETTINGS_FILE)) is None:
        return None
    try:
        stored = dict(yaml.safe_load(file.read_text()))
        return {**stored, "model": dict(stored["model"])}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"model.backbone={folder!r}: {SETTINGS_FILE} in it cannot be read ({type(error).__name__}). Allowed: the "
            "file that export wrote. Fix: export again, or remove the file to use the folder as a plain backbone."
        ) from error


def load_gates(folder: str, gates: nn.ParameterDict) -> None:
    """Fill gates from an exported folder; nothing happens for another backbone, whose gates start at zero.

    Raises:
        UserError: If the folder's gates belong to other layers or another number of heads.
    """
    file = file_beside(folder, GATES_FILE) if len(gates) else None
    if file is None:
        return
    try:
        saved = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.backbone={folder!r}: {GATES_FILE} is damaged ({error}). Fix: export again.") from error
    here = {layer: tuple(gate.shape) for layer, gate in gates.items()}
    there = {layer: tuple(gate.shape) for layer, gate in saved.items()}
    layers = sorted(map(int, here))
    allowed = f"those its gates were trained for, {sorted(map(int, there))}"
    require(here == there, "model.retrieval_layers", layers, allowed, "leave them out, or choose --model.fusion joint")
    for layer, gate in gates.items():
        gate.data.copy_(saved[layer])
