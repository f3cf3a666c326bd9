"""What an evaluation's results depend on."""

import copy
from typing import Any

import pytest

from lightning_memlong.cli.fingerprint import evaluation_identity

GRID = {"class_path": "lightning_memlong.evaluation.PerplexityGrid", "init_args": {"seed": 0, "windows": 4}}
CONFIG: dict[str, Any] = {
    "model": {"backbone": "tiny", "loss_weights": "none", "memory_bias_lr": 0.01, "memory_near": 64},
    "memory": {"top_k": 2, "distractors": 0, "retriever": {"name": "hashing", "cache": True, "prompt": ""}},
    "data": {"class_path": "datamodules.LocalText", "init_args": {"window": 64, "timeout_s": 5}},
    "evaluation": GRID, "trainer": {"precision": "32-true"}, "seed_everything": 0,
}  # fmt: skip


def changed(key: str, value: Any) -> str:
    config = copy.deepcopy(CONFIG)
    *path, last = key.split(".")
    group = config
    for name in path:
        group = group[name]
    group[last] = value
    return evaluation_identity(config, None)


@pytest.mark.parametrize(
    "key", ["model.loss_weights", "model.memory_bias_lr", "memory.distractors", "memory.retriever.cache",
            "data.init_args.timeout_s", "evaluation.init_args.seed"],
)  # fmt: skip
def test_what_changes_nothing_measured_is_taken_up(key: str) -> None:
    assert changed(key, 7) == evaluation_identity(CONFIG, None)


@pytest.mark.parametrize(
    "key", ["model.memory_near", "memory.top_k", "memory.retriever.prompt", "data.init_args.window",
            "evaluation.init_args.windows", "seed_everything"],
)  # fmt: skip
def test_all_else_is_measured_anew(key: str) -> None:
    assert changed(key, 7) != evaluation_identity(CONFIG, None)


def test_the_seed_of_documents_is_not_that_of_intervals() -> None:
    ruler = {"class_path": "lightning_memlong.lm_eval.ruler.Ruler", "init_args": {"seed": 0}}
    other = {**ruler, "init_args": {"seed": 1}}
    assert changed("evaluation", ruler) != changed("evaluation", other)
