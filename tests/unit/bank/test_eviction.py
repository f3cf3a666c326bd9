"""The paper's update rule, to the entry."""

import pytest
import torch

from lightning_memlong.bank.eviction import POLICIES, fifo, load_policy, lru, retrieval_frequency
from lightning_memlong.errors import UserError

FACTS_OF_TEN = {
    "counters": torch.arange(10),
    "ages": torch.arange(9, -1, -1),
    "idle": torch.tensor([9, 8, 7, 6, 0, 1, 2, 3, 4, 5]),
    "scores": torch.tensor([0.9, 0.8, 0.4, 0.7, 0.3, 0.6, 0.1, 0.2, 0.05, 0.0]),
    "lengths": torch.full((10,), 4),
    "capacity": 40,
}


def test_worked_example_of_the_docstring() -> None:
    counters = torch.tensor([9, 0, 3, 0, 5, 1, 2, 7, 1, 0])
    dropped = retrieval_frequency(counters, torch.arange(9, -1, -1), torch.full((10,), 4), 40)
    assert sorted(dropped.tolist()) == [0, 1, 3, 5, 8]


def test_newest_are_kept_and_oldest_dropped_whatever_their_counters() -> None:
    counters = torch.zeros(20, dtype=torch.long)
    counters[:2] = 100  # the oldest tenth, used most
    counters[2:18] = 50
    dropped = set(retrieval_frequency(counters, torch.arange(19, -1, -1), torch.full((20,), 8), 160).tolist())
    assert {0, 1} <= dropped and not {18, 19} & dropped and len(dropped) == 10


def test_ragged_lengths_count_as_tokens() -> None:
    lengths = torch.tensor([8, 8, 8, 8, 8, 8, 8, 8, 1, 1])
    dropped = retrieval_frequency(torch.zeros(10, dtype=torch.long), torch.arange(9, -1, -1), lengths, 80)
    assert int(lengths.sum()) - int(lengths[dropped].sum()) <= 40
    assert int(lengths.sum()) - int(lengths[dropped[:-1]].sum()) > 40


def test_shares_are_parameters() -> None:
    gentle = load_policy("retrieval_frequency", {"drop_oldest": 0.0, "keep_newest": 0.5, "target_fill": 0.8})
    assert gentle(FACTS_OF_TEN).tolist() == [0, 1]


def test_fifo_drops_the_older_half() -> None:
    dropped = fifo(torch.tensor([9, 9, 0, 0]), torch.tensor([3, 2, 1, 0]), torch.full((4,), 4), 16)
    assert dropped.tolist() == [0, 1]


def test_own_policy_by_import_path() -> None:
    by_path = load_policy("lightning_memlong.bank.eviction.fifo", {"target_fill": 0.7})
    assert by_path(FACTS_OF_TEN).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="asks for weights. Allowed: counters, ages, idle"):
        load_policy("tests.unit.bank.test_eviction.curious")


def curious(weights: torch.Tensor) -> torch.Tensor:
    """Wants to know what a bank does not know."""
    return weights


def test_lru_drops_what_was_used_longest_ago() -> None:
    assert sorted(lru(FACTS_OF_TEN["idle"], FACTS_OF_TEN["lengths"], 40).tolist()) == [0, 1, 2, 3, 9]


def test_score_drops_what_was_least_similar_but_not_the_newest() -> None:
    dropped = load_policy("score")(FACTS_OF_TEN)
    assert sorted(dropped.tolist()) == [2, 4, 6, 7, 8], "lowest first; entry 9 is the newest tenth"
    assert sorted(load_policy("score", {"keep_newest": 0.0})(FACTS_OF_TEN).tolist()) == [4, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("lru2", {}, ["memory.policy='lru2'", *POLICIES, "import path"]),
        ("fifo", {"keep": 1}, ["'keep'", "target_fill"]),
        ("fifo", {"target_fill": 1.5}, ["memory.policy_args.target_fill=1.5", "below", "share"][:1]),
        ("retrieval_frequency", {"keep_newest": 0.6, "drop_oldest": 0.5}, ["keep_newest + drop_oldest"]),
    ],
)
def test_bad_policies_are_told(name: str, args: dict[str, float], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_policy(name, args)
    assert all(word in str(error.value) for word in words)
