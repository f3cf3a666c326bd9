"""The model card of an exported folder: what it is, how it loads, and what was measured; nothing that was not."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lightning_memlong.backbone import PACKAGED, file_beside, spans
from lightning_memlong.files import package_file

CARD_FILE = "README.md"
LICENSES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0"}
"""Of packaged backbones, which bring no card of their own."""
OF_MODEL = ("memory_layer", "retrieval_layers", "source", "fusion", "position", "memory_distance", "memory_near",
            "memory_reference", "memory_bias", "memory_scale", "prepend_bos")  # fmt: skip
OF_MEMORY = ("chunk_size", "capacity", "top_k", "candidates", "policy", "selection", "query", "query_chunks",
             "granularity", "retriever")  # fmt: skip
NUMBERS = ("perplexity", "perplexity_memory_off", "perplexity_ratio")


@dataclass
class TrainingFacts:
    """What is known of the run whose checkpoint was exported; what is not there is not known."""

    steps: int
    """Optimiser steps of the checkpoint."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run, by dotted name; without paths of the machine it ran on."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Of the run's memory group, with which its numbers were measured."""
    text: str = ""
    """What it was trained on."""
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    """Row of the table -> numbers of the validation text; of this checkpoint."""
    why_no_results: str = ""
    """Why there are none."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Commit and versions."""


def without_folder(name: str) -> str:
    """A name, or of a path of this machine its last part: cards are read elsewhere.

    Of an address only host and path: what else stands in it may be a password or a signature.
    """
    if "://" in name:
        parts = urlsplit(name)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _base(backbone: str) -> tuple[str, dict[str, Any]]:
    """A backbone in words, and what the card's head says of it, as far as it is known here."""
    if backbone in PACKAGED:
        package, file, hub_id = PACKAGED[backbone]
        words = f"[{hub_id}](https://huggingface.co/{hub_id})"
        words += f", de-quantised from `{file}`" if package_file(package, file) else ""
        return words, {"base_model": hub_id, "license": LICENSES.get(hub_id)}
    head = _head_of_card(backbone)
    if Path(backbone).is_dir() or Path(backbone).is_absolute():
        return f"a folder called {Path(backbone).name}", {key: head.get(key) for key in ("base_model", "license")}
    return f"[{backbone}](https://huggingface.co/{backbone})", {"base_model": backbone, "license": head.get("license")}


def _head_of_card(backbone: str) -> dict[str, Any]:
    """The head of a backbone's own card, in its folder or on the hub; empty where none can be read."""
    if (card := file_beside(backbone, CARD_FILE)) is None:
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def _shown(value: Any) -> str:
    value = value.get("name") if isinstance(value, Mapping) else value  # the encoder
    return f"`{without_folder(value) if isinstance(value, str) else json.dumps(value)}`"


def _settings(settings: Mapping[str, Any], memory: Mapping[str, Any]) -> str:
    rows = [(f"`model.{name}`", _shown(settings[name])) for name in OF_MODEL if name in settings]
    rows += [(f"`memory.{name}`", _shown(memory[name])) for name in OF_MEMORY if name in memory]
    return _table(("setting", "value"), rows)


def _training(run: TrainingFacts | None) -> str:
    if run is None:
        return "Exported without a checkpoint: the weights are the base model's."
    told = [f"{run.steps:,} optimiser steps" + (f" on {run.text}." if run.text else "; the text is not known.")]
    told += (
        [_table(("setting", "value"), [(f"`{k}`", f"`{v}`") for k, v in run.settings.items()])] if run.settings else []
    )
    return "\n\n".join(told)


def _numbers(run: TrainingFacts | None, memory: Mapping[str, Any]) -> str:
    if run is None or not run.results:
        return f"None: {run.why_no_results if run else 'nothing was measured.'}"
    known = [number for number in NUMBERS if any(number in row for row in run.results.values())]
    rows = [
        (name, *(f"{row[number]:.3f}" if number in row else "" for number in known))
        for name, row in run.results.items()
    ]
    heads = {"perplexity": "memory on", "perplexity_memory_off": "memory off", "perplexity_ratio": "on / off"}
    said = "Perplexity on the run's validation text, of the same tokens in each row. Nothing else was measured."
    others = {name: _shown(run.memory[name]) for name in OF_MEMORY if name in run.memory}
    others = {name: value for name, value in others.items() if name in memory and value != _shown(memory[name])}
    if others:
        said += (
            " With other settings than the above: " + ", ".join(f"`memory.{k}` {v}" for k, v in others.items()) + "."
        )
    table = _table(("when", *(heads[number] for number in known)), rows)
    return f"{said}\n\n{table}"


def _made_with(run: TrainingFacts | None) -> str:
    known = run.made_with if run else {}
    return (
        _table(("what", "version"), [(name, f"`{value}`") for name, value in known.items()]) if known else "Not known."
    )


TEXT = """# {name}

Base model: {base}.

It has a long memory: while it reads, keys and values go into a bank, chunk by chunk, and its layers {layers} attend to
the chunks that are retrieved for the text at hand. This is MemLong
([arXiv 2408.16967](https://arxiv.org/abs/2408.16967)). The folder was written by `export` of lightning-memlong.

## Loading

With its memory (`pip install lightning-memlong`):

```python
from lightning_memlong import MemLong
model = MemLong.from_pretrained("{name}")
```

By transformers alone, as a plain decoder without memory:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}")
```

## Memory

{settings}

## Training

{training}

## Numbers

{numbers}

## Made with

{made_with}

## Licence

{license}
"""


def model_card(
    name: str,
    backbone: str,
    settings: Mapping[str, Any],
    memory: Mapping[str, Any],
    run: TrainingFacts | None,
) -> str:
    """The card as a Markdown file with its head.

    Args:
        name: Of the folder, or of the repository it will be.
        backbone: What the model was made from.
        settings: Of the model group.
        memory: Of the memory group.
        run: Where the weights come from; None: no checkpoint was exported.
    """
    base, known = _base(backbone)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lightning-memlong", "long-context", "memory", "arxiv:2408.16967"],
        **{key: value for key, value in known.items() if value},
    )
    licence = known.get("license")
    text = TEXT.format(
        name=name,
        base=base,
        layers=spans(settings["retrieval_layers"]),
        settings=_settings(settings, memory),
        training=_training(run),
        numbers=_numbers(run, memory),
        made_with=_made_with(run),
        license=f"That of the base model: {licence}."
        if licence
        else "That of the base model, which is not known here.",
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{re.sub(r' +$', '', text, flags=re.M)}"))
