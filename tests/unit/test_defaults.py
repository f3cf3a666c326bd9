"""One truth about defaults: the code, ``conf/memlong.yaml``, the README and ``--help`` say the same."""

import inspect
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.documents import DocumentDataModule
from datamodules.local_text import LocalText
from lightning_memlong.backbone import layer_index
from lightning_memlong.cli import main
from lightning_memlong.config import DEFAULT_MEMORY_LAYER, MemoryConfig, ModelConfig, flat
from lightning_memlong.training import MemLongModule

ROOT = Path(__file__).parents[2]
CONF = yaml.safe_load((ROOT / "conf" / "memlong.yaml").read_text())
CONF["data"] = CONF["data"]["init_args"]

BY_INTENT = {
    # The file names the layer of its backbone, of 30 layers; the code a share of any backbone's depth: the same layer.
    "model.memory_layer": (11, DEFAULT_MEMORY_LAYER),
    # Documents of the demonstration are long enough to need a memory; the code leaves out none.
    "data.min_document_tokens": (4096, None),
    # Perplexity gains by many chunks; what is asked for is found with few, and many dilute it.
    "memory.top_k": (16, 3),
}
"""Option -> its value in the file and in the code, where they are to differ."""

LINKED = {"tokenizer", "chunk_size", "seed"}
"""Of the DataModule, what the command line takes from other groups."""


def defaults_of(*callables: Any) -> dict[str, Any]:
    """Default values by name."""
    parameters = [p for c in callables for p in inspect.signature(c.__init__).parameters.values()]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def in_code() -> dict[str, Any]:
    """Every default of the three groups with its dotted key; the recipe of training aside."""
    model = defaults_of(MemLongModule) | asdict(ModelConfig())
    model["tuning"] = asdict(model["tuning"])
    data = {k: v for k, v in defaults_of(DocumentDataModule, LocalText).items() if k not in LINKED}
    return flat({"model": model, "memory": asdict(MemoryConfig()), "data": data})


def recipe(key: str) -> bool:
    """Whether an option is a class with arguments of its own, which is compared as such."""
    return key.startswith(("model.optimizer", "model.scheduler"))


IN_FILE = flat({group: CONF[group] for group in ("model", "memory", "data")})


def test_the_file_and_the_code_agree() -> None:
    file = {k: v for k, v in IN_FILE.items() if not recipe(k)}
    code = {k: v for k, v in in_code().items() if not recipe(k)}
    assert file.keys() == code.keys()
    assert {k: (file[k], code[k]) for k in file if file[k] != code[k]} == BY_INTENT


def test_the_memory_layer_is_the_same_one() -> None:
    assert layer_index("model.memory_layer", DEFAULT_MEMORY_LAYER, 30) == CONF["model"]["memory_layer"]


def test_the_recipe_agrees_but_for_the_length_of_the_run() -> None:
    model, code = CONF["model"], defaults_of(MemLongModule)
    optimizer = code["optimizer"]([torch.nn.Parameter(torch.zeros(1))])
    assert model["optimizer"]["class_path"] == f"torch.optim.{type(optimizer).__name__}"
    given = model["optimizer"]["init_args"]
    assert given == {name: optimizer.defaults[name] for name in given}
    scheduler = code["scheduler"]
    assert model["scheduler"]["class_path"] == f"{scheduler.__module__}.{scheduler.__name__}"
    # The paper's warm-up, and no end; the file's run of 50 steps has a shorter one and ends where training does.
    assert model["scheduler"]["init_args"] == {"warmup_steps": 10, "total_steps": "${trainer.max_steps}"}
    known = defaults_of(scheduler)
    assert known == {"warmup_steps": 1000, "total_steps": None}


def test_the_papers_file_states_what_the_paper_does_otherwise() -> None:
    paper = yaml.safe_load((ROOT / "conf" / "paper.yaml").read_text())
    memory, model = paper["memory"], paper["model"]
    assert (memory["chunk_size"], memory["capacity"], memory["top_k"]) == (128, 32768, 8)
    assert (model["memory_layer"], model["retrieval_layers"]) == (13, [13, 17, 21, 25])


def test_help_says_the_defaults_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    said = {}
    for key in in_code():
        found = re.search(rf"--{re.escape(key)} \S+ (?:(?! --).)*?default: ((?:\[.*?\]|[^)])*)\)", text)
        if found and not recipe(key):
            said[key] = yaml.safe_load(found[1]) if found[1] else ""
    assert {"memory.top_k", "memory.capacity", "model.memory_layer", "data.window"} <= said.keys() and len(said) > 40
    assert said == {key: in_code()[key] for key in said}
