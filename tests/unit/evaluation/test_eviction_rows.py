"""Rows of the eviction table are what they say, whatever the run's own policy."""

from types import SimpleNamespace
from typing import Any

from lightning_memlong.config import MemoryConfig, changed
from lightning_memlong.evaluation import EvictionGrid


def test_a_row_that_names_a_policy_has_its_own_arguments() -> None:
    memory = MemoryConfig(policy="retrieval_frequency", policy_args={"keep_newest": 0.1, "drop_oldest": 0.0})

    def retrieval(options: dict[str, Any], key: str) -> Any:
        return SimpleNamespace(config=changed(memory, options, key), new_bank=lambda rows: None)

    subject: Any = SimpleNamespace(memory=memory, retrieval=retrieval)
    fields: dict[str, dict[str, Any]] = {
        "fifo": {"policy": "fifo"}, "paper": {"policy": "retrieval_frequency"}, "own": {"half_life": 9.0},
        "other": {"policy": "retrieval_frequency", "policy_args": {"target_fill": 0.7}},
    }  # fmt: skip
    grid = EvictionGrid(policies=fields)
    found = {name: grid._way(subject, name, options, 1024).config.policy_args for name, options in fields.items()}
    assert found == {"fifo": {}, "paper": {}, "own": memory.policy_args, "other": {"target_fill": 0.7}}
