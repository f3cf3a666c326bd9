"""Settings that cannot work are told with key, value, what is allowed and the fix."""

import pytest

from lightning_memlong.config import MemoryConfig, RetrieverConfig, TuningConfig
from lightning_memlong.errors import UserError
from lightning_memlong.retrieval import load_selector


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MemoryConfig(top_k=300), ["memory.top_k=300", "38400", "memory.capacity=16384", "128"]),
        (lambda: MemoryConfig(capacity=1000), ["memory.capacity=1000", "multiple", "chunk_size=128", "1024"]),
        (lambda: MemoryConfig(chunk_size=0), ["memory.chunk_size=0", "1 or more"]),
        (lambda: MemoryConfig(query="next"), ["memory.query='next'", "previous, current"]),  # type: ignore[arg-type]
        (lambda: MemoryConfig(newest=-1), ["memory.newest=-1", "share from 0 to 1"]),
        (lambda: load_selector("best"), ["memory.selection='best'", "recent"]),
        (lambda: MemoryConfig(dtype="int4"), ["memory.dtype='int4'", "bfloat16"]),  # type: ignore[arg-type]
        (lambda: RetrieverConfig(batch_size=0), ["memory.retriever.batch_size=0"]),
        (lambda: RetrieverConfig(dtype="int8"), ["memory.retriever.dtype='int8'", "auto, float32, bfloat16"]),
        (lambda: RetrieverConfig(max_length=2), ["memory.retriever.max_length=2"]),
        (lambda: TuningConfig(mode="half"), ["model.tuning.mode='half'", "full, lora"]),  # type: ignore[arg-type]
        (lambda: TuningConfig(lora_rank=0), ["model.tuning.lora_rank=0"]),
        (lambda: TuningConfig(lora_dropout=1.0), ["model.tuning.lora_dropout=1.0"]),
    ],
)
def test_bad_settings_are_told(build: object, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build()  # type: ignore[operator]
    assert all(word in str(error.value) for word in [*words, "Allowed:", "Fix:"])


def test_fewer_candidates_than_are_read_are_told() -> None:
    with pytest.raises(UserError, match="memory.candidates=2.*at least memory.top_k=3"):
        MemoryConfig(candidates=2)
    with pytest.raises(UserError, match="memory.candidates=200.*at most memory.capacity=16384"):
        MemoryConfig(candidates=200)
