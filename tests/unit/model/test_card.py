"""The model card, word for word, and what is left out of it where nothing is known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

import lightning_memlong.cli.training_facts as gathering
from lightning_memlong.cli.training_facts import training_facts
from lightning_memlong.model import TrainingFacts, card
from lightning_memlong.model.card import model_card

SETTINGS = {"memory_layer": 3, "retrieval_layers": [3, 4, 5, 7], "position": "fixed", "memory_bias": True}
MEMORY = {"chunk_size": 128, "top_k": 16, "candidates": None, "retriever": {"name": "/home/me/secret/encoder"}}
RUN = TrainingFacts(
    1200,
    settings={"data.window": 512, "seed_everything": 0},
    text="LocalText, files called books",
    results={
        "before training": {"perplexity": 20.0, "perplexity_memory_off": 22.0, "perplexity_ratio": 0.9091},
        "after training": {"perplexity": 18.12345},
    },
    made_with={"commit": "abc", "python": "3.11.7"},
)
CARD = """---
base_model: owner/model
library_name: transformers
pipeline_tag: text-generation
tags:
- lightning-memlong
- long-context
- memory
- arxiv:2408.16967
---

# me/mine

Base model: [owner/model](https://huggingface.co/owner/model).

It has a long memory: while it reads, keys and values go into a bank, chunk by chunk, and its layers 3-5,7 attend to
the chunks that are retrieved for the text at hand. This is MemLong
([arXiv 2408.16967](https://arxiv.org/abs/2408.16967)). The folder was written by `export` of lightning-memlong.

## Loading

With its memory (`pip install lightning-memlong`):

```python
from lightning_memlong import MemLong
model = MemLong.from_pretrained("me/mine")
```

By transformers alone, as a plain decoder without memory:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/mine")
```

## Memory

| setting | value |
|---|---|
| `model.memory_layer` | `3` |
| `model.retrieval_layers` | `[3, 4, 5, 7]` |
| `model.position` | `fixed` |
| `model.memory_bias` | `true` |
| `memory.chunk_size` | `128` |
| `memory.top_k` | `16` |
| `memory.candidates` | `null` |
| `memory.retriever` | `encoder` |

## Training

1,200 optimiser steps on LocalText, files called books.

| setting | value |
|---|---|
| `data.window` | `512` |
| `seed_everything` | `0` |

## Numbers

Perplexity on the run's validation text, of the same tokens in each row. Nothing else was measured.

| when | memory on | memory off | on / off |
|---|---|---|---|
| before training | 20.000 | 22.000 | 0.909 |
| after training | 18.123 |  |  |

## Made with

| what | version |
|---|---|
| commit | `abc` |
| python | `3.11.7` |

## Licence

That of the base model, which is not known here.
"""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_the_card_says_what_is_known() -> None:
    assert model_card("me/mine", "owner/model", SETTINGS, MEMORY, RUN) == CARD


def test_numbers_of_other_memory_settings_say_so() -> None:
    text = model_card("mine", "owner/model", SETTINGS, MEMORY, replace(RUN, memory=MEMORY | {"top_k": 3}))
    assert "Nothing else was measured. With other settings than the above: `memory.top_k` `3`.\n" in text
    text = model_card("mine", "owner/model", SETTINGS, MEMORY, replace(RUN, memory=MEMORY))
    assert "With other settings" not in text


def test_it_says_what_is_not_known() -> None:
    text = model_card("mine", "owner/model", SETTINGS, {}, None)
    assert "the weights are the base model's." in text and "None: nothing was measured." in text
    assert "Not known." in text and "perplexity" not in text.lower() and "memory.chunk_size" not in text
    text = model_card("mine", "owner/model", SETTINGS, {}, TrainingFacts(3, why_no_results="because."))
    assert "3 optimiser steps; the text is not known." in text and "None: because." in text


def test_the_base_model_and_its_licence(tmp_path: Path) -> None:
    packaged = ModelCard(model_card("mine", "smollm2-135m", SETTINGS, {}, None))
    assert packaged.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and packaged.data.license == "apache-2.0"
    assert "That of the base model: apache-2.0." in packaged.text
    folder = tmp_path / "private" / "tuned"
    folder.mkdir(parents=True)
    unknown = ModelCard(model_card("mine", str(folder), SETTINGS, {}, None))
    assert unknown.data.base_model is None and "a folder called tuned." in unknown.text
    (folder / "README.md").write_text("---\nbase_model: owner/model\nlicense: mit\n---\n# tuned\n")
    told = ModelCard(model_card("mine", str(folder), SETTINGS, {}, None))
    assert told.data.base_model == "owner/model" and told.data.license == "mit"
    assert str(tmp_path) not in str(told) + str(unknown)
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    damaged = ModelCard(model_card("mine", str(folder), SETTINGS, {}, None))
    assert damaged.data.base_model is None and damaged.data.license is None


def test_the_licence_of_a_base_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: other/one\n---\n")
    monkeypatch.setattr(card, "file_beside", lambda name, file: tmp_path / file if name == "owner/model" else None)
    told = ModelCard(model_card("mine", "owner/model", SETTINGS, {}, None))
    assert told.data.license == "mit" and told.data.base_model == "owner/model"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose checkpoint is of step 50."""
    monkeypatch.setattr(gathering, "read_checkpoint", lambda path, given: {"global_step": 50})
    data = {"class_path": "datamodules.PG19", "init_args": {"path": None, "window": 512}}
    config = {"seed_everything": 0, "data": data, "model": {"backbone": "/home/me/model", "loss_weights": "none"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "config_test.yaml").write_text(yaml.safe_dump({"seed_everything": 9}))
    record = {"git_commit": "abc", "command": ["/home/me/train.py"], "versions": {"python": "3.11.7", "numpy": "2"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "results.json").write_text(json.dumps({"steps": 50, "before": {}, "after": {"perplexity": 9.5}}))
    return tmp_path


def test_what_a_run_folder_says(run: Path) -> None:
    facts = training_facts(str(run / "checkpoints" / "last.ckpt"))
    assert facts.steps == 50 and facts.text == "PG19, the data set emozilla/pg19"
    assert facts.settings == {"data.window": 512, "model.loss_weights": "none", "seed_everything": 0}
    assert facts.made_with == {"commit": "abc", "python": "3.11.7"}
    assert facts.results == {"after training": {"perplexity": 9.5}} and not facts.why_no_results
    assert "/home/me" not in model_card("mine", "/home/me/model", SETTINGS, MEMORY, facts)


def test_numbers_of_another_step_are_not_those_of_the_checkpoint(run: Path) -> None:
    (run / "results.json").write_text(json.dumps({"steps": 60, "after": {"perplexity": 9.5}}))
    facts = training_facts(str(run / "checkpoints" / "last.ckpt"))
    assert not facts.results and "after 60 steps, not after 50" in facts.why_no_results
    (run / "results.json").unlink()
    assert "had not ended" in training_facts(str(run / "checkpoints" / "last.ckpt")).why_no_results


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("LocalText", {"path": None}, "the sources of Python's standard library"),
        ("LocalText", {"path": {"train": ["/a/one", "/a/two"], "test": "/b/three"}}, "files called one, two"),
        ("LocalText", {"path": "https://me:secret@host/b.txt?X-Signature=abc"}, "called https://host/b.txt"),
        ("LocalText", {"path": "../../me/private/*.txt"}, "files called *.txt"),
        ("PG19", {"hub_id": "owner/books"}, "the data set owner/books"),
        ("SyntheticRecall", {}, "documents made on the spot"),
    ],
)
def test_the_text_in_words(kind: str, options: dict[str, object], words: str, run: Path) -> None:
    config = {"data": {"class_path": f"datamodules.{kind}", "init_args": options}}
    (run / "config_2.yaml").write_text(yaml.safe_dump(config))  # of the run that went on
    assert training_facts(str(run / "checkpoints" / "last.ckpt")).text.endswith(words)
