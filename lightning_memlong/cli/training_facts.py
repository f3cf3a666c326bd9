"""What a model card says of a run: read from its folder, without paths of this machine."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import datamodules
from lightning_memlong.config import flat
from lightning_memlong.model import TrainingFacts, read_checkpoint, run_of, without_folder

TOLD = ("data.window", "data.stride", "data.batch_size", "trainer.accumulate_grad_batches", "trainer.precision",
        "model.tuning.mode", "model.optimizer.class_path", "model.optimizer.lr", "model.loss_weights",
        "memory.distractors", "seed_everything")  # fmt: skip
ROWS = {"before": "before training", "after": "after training"}
PACKAGES = ("lightning-memlong", "python", "torch", "lightning", "transformers")


def training_facts(ckpt_path: str) -> TrainingFacts:
    """Of a checkpoint and of the run folder it lies in.

    Args:
        ckpt_path: The file.

    Raises:
        UserError: If it is not a checkpoint.
    """
    steps, folder = int(read_checkpoint(Path(ckpt_path), ckpt_path)["global_step"]), run_of(Path(ckpt_path))
    facts = TrainingFacts(steps, why_no_results="the checkpoint lies in no run folder.")
    if folder is None:
        return facts
    config = _newest(folder, "config", ".yaml")
    settings = {key.replace("init_args.", ""): value for key, value in flat(config).items()}
    facts.settings = {key: settings[key] for key in TOLD if settings.get(key) is not None}
    facts.memory = dict(config.get("memory") or {})
    facts.text = _text_of(config.get("data") or {})
    record = _newest(folder, "run", ".json")
    facts.made_with = {"commit": str(record.get("git_commit", "unknown"))} | {
        name: str(record["versions"][name]) for name in PACKAGES if name in record.get("versions", {})
    }
    facts.results, facts.why_no_results = _results_of(folder, steps)
    return facts


def _newest(folder: Path, name: str, ending: str) -> Mapping[str, Any]:
    """What ``fit`` wrote last: a run that went on has ``config_2.yaml`` and so on."""
    files = {int(m[1] or 1): file for file in folder.iterdir()
             if (m := re.fullmatch(rf"{name}(?:_(\d+))?{re.escape(ending)}", file.name))}  # fmt: skip
    return yaml.safe_load(files[max(files)].read_text()) or {} if files else {}  # JSON is YAML


def _text_of(data: Mapping[str, Any]) -> str:
    """The text of the data group in words."""
    options, kind = data.get("init_args") or {}, str(data.get("class_path", ""))
    corpus = getattr(datamodules, kind.removeprefix("datamodules."), None)
    named = f"{kind.rpartition('.')[2]}, "
    if path := options.get("path"):
        trained_on = path.get("train", path) if isinstance(path, Mapping) else path
        parts = trained_on if isinstance(trained_on, list) else [trained_on]
        return named + "files called " + ", ".join(_called(str(part)) for part in parts)
    if getattr(corpus, "plants", False):
        return named + "documents made on the spot"
    if where := options.get("hub_id") or getattr(getattr(corpus, "hub", None), "id", None):
        return named + f"the data set {without_folder(where)}"
    return "the sources of Python's standard library" if kind.endswith("LocalText") else ""


def _called(path: str) -> str:
    """An address, or of a path its last part, which need not be there any more."""
    return without_folder(path) if "://" in path else Path(path).name


def _results_of(folder: Path, steps: int) -> tuple[dict[str, dict[str, float]], str]:
    """The numbers of a run that has ended with this checkpoint; or why there are none."""
    file = folder / "results.json"
    if not file.is_file():
        return {}, "the run had not ended when its checkpoint was exported."
    found = json.loads(file.read_text())
    if found.get("steps") != steps:
        return {}, f"those of the run were measured after {found.get('steps')} steps, not after {steps}."
    rows = {name: found[key] for key, name in ROWS.items() if "perplexity" in found.get(key, {})}
    return rows, "" if rows else "the run validated nothing."
