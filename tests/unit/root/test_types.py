"""Settings are checked by type, so that what a file gets wrong is told by its name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import PG19
from lightning_memlong.config import MemoryConfig, ModelConfig, RetrieverConfig, TuningConfig
from lightning_memlong.errors import UserError

WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (MemoryConfig, {"top_k": None}, "memory.top_k=None.*a whole number"),
    (MemoryConfig, {"top_k": 3.0}, "memory.top_k=3.0.*a whole number"),
    (MemoryConfig, {"top_k": True}, "memory.top_k=True.*a whole number"),
    (MemoryConfig, {"half_life": float("inf")}, "memory.half_life=inf.*a number or null"),
    (MemoryConfig, {"enabled": None}, "memory.enabled=None.*true or false"),
    (MemoryConfig, {"policy": 3}, "memory.policy=3.*a text"),
    (RetrieverConfig, {"batch_size": "4"}, "memory.retriever.batch_size='4'"),
    (ModelConfig, {"memory_bias": None}, "model.memory_bias=None"),
    (TuningConfig, {"lora_alpha": float("nan")}, "model.tuning.lora_alpha=nan"),
    (PG19, {"validation_fraction": None}, "data.validation_fraction=None.*a number"),
    (PG19, {"chunk_size": 0}, "memory.chunk_size=0"),
    (PG19, {"min_document_tokens": -1}, "data.min_document_tokens=-1"),
]


@pytest.mark.parametrize("config, settings, words", WRONG)
def test_a_wrong_type_is_told(config: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(**settings)


def test_what_is_as_good_is_taken(tmp_path: Path) -> None:
    assert MemoryConfig(top_k=np.int64(4), half_life=3, storage_folder=tmp_path).top_k == 4  # type: ignore[arg-type]
    assert ModelConfig(memory_weights=tmp_path / "x").memory_weights == tmp_path / "x"  # type: ignore[arg-type]
    assert TuningConfig(lora_alpha=8).lora_alpha == 8
