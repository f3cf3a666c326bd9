"""What an evaluation's results depend on, as one short name: the same settings find what was measured before."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECIPE = ("optimizer", "scheduler", "gradient_checkpointing", "compare_memory_off", "tuning")
"""Of the model group, what has no effect on an evaluation."""
AROUND = ("num_workers", "retries", "cache", "shuffle", "shuffle_buffer", "batch_size", "on_bad_document")
"""Of the data group, likewise."""


def evaluation_identity(config: Mapping[str, Any], ckpt_path: str | None) -> str:
    """A digest of the settings and weights.

    Args:
        config: The configuration of the subcommand, as plain values.
        ckpt_path: Its checkpoint, if any.
    """
    model = {k: v for k, v in config["model"].items() if k not in RECIPE}
    data = {**config["data"], "init_args": _without(config["data"].get("init_args") or {}, AROUND)}
    facts = {"model": model, "memory": config["memory"], "data": data, "evaluation": config["evaluation"]}
    facts |= {"precision": config["trainer"].get("precision"), "seed": config.get("seed_everything")}
    facts |= {"weights": _weights(Path(str(model["backbone"]))), "checkpoint": _content(ckpt_path)}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()


def _without(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in names}


def _weights(folder: Path) -> list[tuple[str, int, int]]:
    """Files of a backbone's folder; nothing for a name."""
    if not folder.is_dir():
        return []
    return sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir() if f.is_file())


def _content(file: str | None) -> str | None:
    if file is None or not Path(file).is_file():
        return None
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
