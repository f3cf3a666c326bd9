"""What an evaluation's results depend on, as one short name: the same settings find what was measured before."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

FORMAT = 4
"""Raised when what is measured changes, so that no table mixes old and new."""
RECIPE = ("optimizer", "scheduler", "gradient_checkpointing", "compile", "compare_memory_off", "tuning", "loss_weights",
          "memory_bias_lr")  # fmt: skip
"""Of the model group, what has no effect on an evaluation."""
AROUND = ("num_workers", "retries", "timeout_s", "cache", "shuffle", "shuffle_buffer", "batch_size", "on_bad_document")
"""Of the data group, likewise."""
TRAINING = ("distractors", "save_keys_values")
"""Of the memory group, likewise."""
KEEPING = ("cache", "batch_size")
"""Of the retriever's, likewise."""


def evaluation_identity(config: Mapping[str, Any], ckpt_path: str | None) -> str:
    """A digest of the settings and weights.

    Args:
        config: The configuration of the subcommand, as plain values.
        ckpt_path: Its checkpoint, if any.
    """
    model = _without(config["model"], RECIPE)
    data = {**config["data"], "init_args": _without(config["data"].get("init_args") or {}, AROUND)}
    memory = {**_without(config["memory"], TRAINING), "retriever": _without(config["memory"]["retriever"], KEEPING)}
    facts = {"model": model, "memory": memory, "data": data, "evaluation": _measured(config["evaluation"])}
    facts |= {"precision": config["trainer"].get("precision"), "seed": config.get("seed_everything")}
    named = [model["backbone"], config["memory"]["retriever"]["name"], *_texts(config["evaluation"])]
    if model.get("memory_weights") not in (None, "auto"):
        named.append(model["memory_weights"])
    facts |= {"format": FORMAT, "files": [_files(name) for name in named], "checkpoint": _content(ckpt_path)}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()


def _without(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in names}


def _measured(evaluation: Any) -> Any:
    """The settings of an evaluation but for those its report alone depends on."""
    if not isinstance(evaluation, Mapping):
        return evaluation
    reported = getattr(resolve_name(evaluation["class_path"]), "reported", ())
    return {**evaluation, "init_args": _without(evaluation.get("init_args") or {}, reported)}


def _texts(settings: Any) -> list[str]:
    """All texts in nested settings: some of them name files."""
    if isinstance(settings, str):
        return [settings]
    inside = settings.values() if isinstance(settings, Mapping) else settings if isinstance(settings, list) else ()
    return [text for value in inside for text in _texts(value)]


def _files(name: str) -> list[tuple[str, int, int]]:
    """The files of a folder, or a file, with size and time of change; nothing for any other name."""
    path = Path(str(name))
    files = [path] if path.is_file() else sorted(path.rglob("*"))[:10_000] if name and path.is_dir() else []
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def _content(file: str | None) -> str | None:
    if file is None or not Path(file).is_file():
        return None
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
