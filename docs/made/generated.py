"""The pages that are made from the code and from ``conf/``, as Markdown; none of them is kept in git."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from options import Option, options_of, shown

from callbacks.checkpoint import LastCheckpoint
from callbacks.dashboard import Dashboard
from callbacks.memory_weights import MemoryWeights
from callbacks.throughput import Throughput
from datamodules import BookCorpus, DocumentDataModule, SyntheticRecall
from lightning_memlong.bank.eviction import POLICIES
from lightning_memlong.cli.parser import typed_option
from lightning_memlong.cli.trainer import Trainer
from lightning_memlong.config import MemoryConfig, ModelConfig, TuningConfig, flat
from lightning_memlong.evaluation import EvictionGrid, InContextLearning, PerplexityGrid, RecallProbes
from lightning_memlong.lm_eval import Ruler
from lightning_memlong.sweep.settings import Sweep
from lightning_memlong.training import LinearWarmup, MemLongModule

ROOT = Path(__file__).parents[2]
GIVEN = frozenset({"model", "datamodule"})
"""Arguments of the Trainer's methods that are no options."""
LINKED = frozenset({"tokenizer", "chunk_size", "seed"})
"""Of a DataModule, what the command line takes from other groups."""
MADE = "This page is made from the code: the texts are those of `--help`, what is allowed is what its checks allow."


BESIDE = "Beside those of every corpus, for `--data datamodules."


@dataclass(frozen=True)
class Section:
    """The options of one thing."""

    heading: str
    make: Callable[..., Any]
    group: str
    text: str = ""
    leave_out: frozenset[str] = frozenset()


OPTIONS: dict[str, tuple[str, list[Section]]] = {
    "model": (
        "Options: model",
        [
            Section("Training", MemLongModule, "model", "", frozenset({"tuning"})),
            Section("The network", ModelConfig, "model"),
            Section("What is tuned", TuningConfig, "model.tuning"),
            Section("The schedule", LinearWarmup, "model.scheduler", "", frozenset({"optimizer"})),
        ],
    ),
    "memory": ("Options: memory", [Section("The bank, and how it is read", MemoryConfig, "memory")]),
    "data": (
        "Options: data",
        [
            Section("Every corpus", DocumentDataModule, "data", "", LINKED),
            Section("BookCorpus", BookCorpus, "data", f"{BESIDE}BookCorpus`:"),
            Section("SyntheticRecall", SyntheticRecall, "data", f"{BESIDE}SyntheticRecall`:"),
        ],
    ),
    "evaluation": (
        "Options: evaluation",
        [
            Section("PerplexityGrid", PerplexityGrid, "evaluation", "`conf/eval/perplexity.yaml`, `choosing.yaml`, "
                    "`reading.yaml`, `alternatives.yaml`, `focused_transformer.yaml`"),
            Section("InContextLearning", InContextLearning, "evaluation", "`conf/eval/icl.yaml`"),
            Section("RecallProbes", RecallProbes, "evaluation", "`conf/eval/recall.yaml`"),
            Section("EvictionGrid", EvictionGrid, "evaluation", "`conf/eval/eviction.yaml`"),
            Section("Ruler", Ruler, "evaluation", "`conf/eval/ruler.yaml`; `pip install -e '.[lm_eval]'`"),
        ],
    ),
    "commands": (
        "Options: commands",
        [
            Section("predict", Trainer.predict, "", "Reads documents and answers prompts.", GIVEN),
            Section("chat", Trainer.chat, "", "A conversation at the terminal.", GIVEN),
            Section("export", Trainer.export, "", "Writes a plain Hugging Face folder.", GIVEN),
            Section("layers", Trainer.layers, "", "Scores the backbone with memory in other layers.", GIVEN),
        ],
    ),
    "sweep": ("Options: sweep", [Section("A sweep file", Sweep, "")]),
    "callbacks": (
        "Options: callbacks",
        [
            Section("callbacks.checkpoint.LastCheckpoint", LastCheckpoint, "trainer.callbacks"),
            Section("callbacks.dashboard.Dashboard", Dashboard, "trainer.callbacks"),
            Section("callbacks.throughput.Throughput", Throughput, "trainer.callbacks"),
            Section("callbacks.memory_weights.MemoryWeights", MemoryWeights, "trainer.callbacks"),
        ],
    ),
}  # fmt: skip
"""Page -> its title and sections."""

BEFORE = {
    "commands": "Every subcommand takes the groups `model`, `memory`, `data` and `trainer`, `--config FILE` (several: "
    "later ones win), `--ckpt_path` (`last`, or a `.ckpt` file), `--seed_everything` [number] and `--validate_first` "
    "[true or false: validate before the first step of `fit`]. `fit`, `validate` and `test` have no others, but "
    "`test --evaluation` and, of an evaluation, `test --part N/M`: every M-th document from the N-th on. "
    "`memlong look --help` names those of the page to look at. `--debug` shows tracebacks. `trainer` is "
    "[Lightning's](https://lightning.ai/docs/pytorch/stable/common/trainer.html#trainer-flags).",
    "callbacks": "Callbacks are named in `trainer.callbacks`, and their options beside them: "
    "`--trainer.callbacks.every_n_steps 50` changes the last one of the list.",
    "sweep": "What a file in `conf/sweeps/` can hold; each is also an option of `python -m lightning_memlong.sweep`.",
}


def _shipped() -> dict[str, str]:
    """What ``conf/memlong.yaml`` says of each option of ours."""
    config = yaml.safe_load((ROOT / "conf" / "memlong.yaml").read_text())
    return {typed_option(k): shown(v) for g in ("model", "memory", "data") for k, v in flat(config[g], g).items()}


SHIPPED = _shipped()


def option_lines(option: Option, heading: str) -> Iterator[str]:
    """One option: what it is, then the facts on one line."""
    anchor = re.sub(r"[^\w.]+", "-", f"{heading}.{option.key}" if heading else option.key)
    yield f'### `{option.key}` {{ #{anchor} data-toc-label="{option.key}" }}\n'
    yield _text(option.text) + "\n"
    facts = [f"default `{option.default}`"] + ([f"unit: {option.unit}"] if option.unit else [])
    shipped = SHIPPED.get(option.key, option.default)
    facts += [f"`conf/memlong.yaml`: `{shipped}`"] if shipped != option.default else []
    yield f"*{' · '.join(facts)} · allowed: {_text(option.allowed)}*" + "{ .facts }\n"


def _text(said: str) -> str:
    """A docstring as Markdown: double backticks are single ones, what reads as a tag or a link is code."""
    said = said.replace("``", "`")
    return re.sub(r"(?<![`\w])(\{[^{}]*\}|\[[^\[\]]*\](?!\()|<\|?[\w|.]+>?)(?!`)", r"`\1`", said)


def options_page(name: str) -> str:
    """A page of options."""
    title, sections = OPTIONS[name]
    lines = [f"# {title}\n", MADE + "\n", *([BEFORE[name] + "\n"] if name in BEFORE else [])]
    for number, section in enumerate(sections):
        lines += [f"## {section.heading}\n", *([section.text + "\n"] if section.text else [])]
        for option in options_of(section.make, section.group, section.leave_out):
            lines += option_lines(option, section.heading if number and name != "model" else "")
        if section.make is MemoryConfig:
            lines += _policies()
    return "\n".join(lines)


def _policies() -> Iterator[str]:
    """What ``memory.policy_args`` may hold, policy by policy."""
    yield "## Arguments of the policies\n"
    yield "What `memory.policy_args` may hold: shares, from 0 up to but not including 1.\n"
    yield "| policy | arguments and defaults |\n|---|---|"
    for name, policy in POLICIES.items():
        given = ", ".join(f"`{k}: {v}`" for k, v in (policy.__kwdefaults__ or {}).items())
        yield f"| `{name}` | {given or 'none'} |"


PYTHON: dict[str, tuple[str, str, list[str]]] = {
    "memlong": (
        "Python: models",
        "Reading, writing and talking about what was read.",
        ["lightning_memlong.MemLong", "lightning_memlong.model.MemLongModel", "lightning_memlong.Conversation",
         "lightning_memlong.generation.Passage", "lightning_memlong.UserError"],
    ),
    "memory": (
        "Python: memory",
        "The bank, what it hands to a model, what is evicted and what is chosen.",
        ["lightning_memlong.MemoryBank", "lightning_memlong.bank.BankView", "lightning_memlong.Retrieved",
         "lightning_memlong.bank.eviction", "lightning_memlong.retrieval.selection",
         "lightning_memlong.retrieval.Retriever", "lightning_memlong.retrieval_causal_attention"],
    ),
    "settings": (
        "Python: settings",
        "The same settings as on the command line, as dataclasses.",
        ["lightning_memlong.MemoryConfig", "lightning_memlong.RetrieverConfig", "lightning_memlong.ModelConfig",
         "lightning_memlong.TuningConfig"],
    ),
    "data": (
        "Python: data",
        "DataModules: documents in, windows out.",
        ["datamodules.DocumentDataModule", "datamodules.LocalText", "datamodules.PG19", "datamodules.BookCorpus",
         "datamodules.WikiText103", "datamodules.ProofPile", "datamodules.SyntheticRecall", "datamodules.Hub",
         "datamodules.Columns", "datamodules.Shard", "datamodules.Record", "datamodules.Document"],
    ),
    "training": (
        "Python: training",
        "The LightningModule, and the callbacks: the memory bank's, and observers.",
        ["lightning_memlong.MemLongModule", "lightning_memlong.training.LinearWarmup", "callbacks.MemoryBankCallback",
         "callbacks.Dashboard", "callbacks.LastCheckpoint", "callbacks.ProgressBar", "callbacks.Throughput"],
    ),
    "evaluation": (
        "Python: evaluation",
        "What an evaluation is derived from, and those that come with the project.",
        ["lightning_memlong.evaluation.Evaluation", "lightning_memlong.evaluation.Subject",
         "lightning_memlong.evaluation.Report", "lightning_memlong.evaluation.Record",
         "lightning_memlong.evaluation.PerplexityGrid", "lightning_memlong.evaluation.InContextLearning",
         "lightning_memlong.evaluation.RecallProbes", "lightning_memlong.evaluation.EvictionGrid",
         "lightning_memlong.lm_eval.Ruler", "lightning_memlong.evaluation.sweep_layers"],
    ),
}  # fmt: skip
"""Page -> its title, what it is about, and the names on it."""


MODULES = ("eviction", "selection")
"""Names that are shown with all that is in them."""


def python_page(name: str) -> str:
    """A page of docstrings, which mkdocstrings fills."""
    title, text, names = PYTHON[name]
    split = [tuple(one.rpartition(".")[::2]) for one in names]
    modules = dict.fromkeys(module for module, name in split if name not in MODULES)
    imports = [f"from {m} import {', '.join(n for of, n in split if of == m and n not in MODULES)}" for m in modules]
    lines = [f"# {title}\n", text + "\n", "```python", *imports, "```\n"]
    return "\n".join([*lines, *(f"::: {_home(module, name)}\n" for module, name in split)])


def _home(module: str, attribute: str) -> str:
    """Where a name that is loaded on first use is written: what reads the code does not run it."""
    package = import_module(module)
    homes = getattr(package, "_ROOM", None) or getattr(package, "_HOME", {})
    return ".".join(part for part in (module, homes.get(attribute), attribute) if part)


CONF = {
    ".": "The default run, the paper's setting, and several GPUs.",
    "ablations": "What differs from the default run, one thing each: `--config conf/memlong.yaml --config "
    "conf/ablations/X.yaml`.",
    "data": "Corpora: `--config conf/memlong.yaml --config conf/data/X.yaml`.",
    "eval": "Evaluations: `python train.py test --config conf/memlong.yaml --config conf/eval/X.yaml`.",
    "recipes": "Longer training, and learning the numbers of memory alone.",
    "sweeps": "Sweeps: `python -m lightning_memlong.sweep conf/sweeps/X.yaml`.",
}


def yaml_page() -> str:
    """Every file of ``conf/``, whole."""
    conf = ROOT / "conf"
    lines = ["# Configuration files\n", "Every file of `conf/`, as it is in the repository. A second `--config` holds "
             "only what differs; a list in it replaces a list, `callbacks+:` adds to one.\n"]  # fmt: skip
    for folder, text in CONF.items():
        lines += [f"## conf/{'' if folder == '.' else folder}\n", text + "\n"]
        for file in sorted((conf / folder).glob("*.yaml")):
            lines += [f"### {file.relative_to(conf.parent)}\n", f"```yaml\n{file.read_text().rstrip()}\n```\n"]
    return "\n".join(lines)


def all_pages() -> dict[str, str]:
    """Path below ``docs/`` -> Markdown."""
    return (
        {f"reference/options/{name}.md": options_page(name) for name in OPTIONS}
        | {f"reference/python/{name}.md": python_page(name) for name in PYTHON}
        | {"reference/yaml.md": yaml_page()}
    )
