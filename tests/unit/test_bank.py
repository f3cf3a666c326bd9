"""The bank against a plain-Python model of itself: no entry lost, duplicated or mixed between rows."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_memlong.bank import MemoryBank
from lightning_memlong.errors import UserError
from tests.reference import BankOracle

CHUNK, SIZE, HEADS, LAYERS, EMBED = 4, 3, 2, 2, 5
ROWS, SLOTS = 2, 10


class Pair:
    """A bank and its oracles, driven together."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.bank = self.new_bank()
        self.oracles = [BankOracle(SLOTS, SLOTS * CHUNK, policy) for _ in range(ROWS)]
        self.positions = [0] * ROWS
        self.mixer = torch.Generator().manual_seed(0)

    def new_bank(self) -> MemoryBank:
        return MemoryBank(ROWS, SLOTS * CHUNK, CHUNK, self.policy)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.mixer)

    def insert(self, lengths: list[list[int]]) -> None:
        chunks = len(lengths[0])
        keys, values = (self.rand(LAYERS, ROWS, HEADS, chunks * CHUNK, SIZE) for _ in range(2))
        embeddings = torch.nn.functional.normalize(self.rand(ROWS, chunks, EMBED), dim=-1)
        positions = torch.zeros(ROWS, chunks, dtype=torch.long)
        for row in range(ROWS):
            facts: list[dict[str, Any]] = []
            for j in range(chunks):
                positions[row, j] = self.positions[row] + j * CHUNK
                place = slice(j * CHUNK, (j + 1) * CHUNK)
                facts.append(
                    {"length": lengths[row][j], "position": int(positions[row, j]), "embedding": embeddings[row, j],
                     "keys": keys[:, row, :, place], "values": values[:, row, :, place]}
                )  # fmt: skip
            self.oracles[row].insert(facts)
            self.positions[row] += chunks * CHUNK
        self.bank.insert(keys, values, embeddings, torch.tensor(lengths), positions)

    def retrieve(self, top_k: int, exclude: bool) -> None:
        query = self.rand(ROWS, EMBED)
        before = torch.tensor([p - CHUNK if exclude else 10**9 for p in self.positions])
        scores, entries = self.bank.search(query, top_k, before)
        found = self.bank.gather(entries, scores)
        for row, oracle in enumerate(self.oracles):
            expected = oracle.search(query[row], top_k, int(before[row]))
            assert [e for e in entries[row].tolist() if e >= 0] == expected
            oracle.count(expected)
            if found is not None:
                self.check_gathered(found, row, sorted(expected))

    def check_gathered(self, found: Any, row: int, places: list[int]) -> None:
        missing = found.entries.shape[1] - len(places)
        assert found.entries[row].tolist() == [-1] * missing + places
        for j, place in enumerate(places):
            entry = self.oracles[row].entries[place]
            tokens = slice((missing + j) * CHUNK, (missing + j + 1) * CHUNK)
            assert torch.equal(found.keys[:, row, :, tokens], entry["keys"])
            assert torch.equal(found.values[:, row, :, tokens], entry["values"])
            assert found.mask[row, tokens].tolist() == [i < entry["length"] for i in range(CHUNK)]
            assert found.positions[row, missing + j] == entry["position"]
        assert not found.mask[row, : missing * CHUNK].any() and torch.isfinite(found.keys).all()

    def reset(self, rows: list[bool]) -> None:
        self.bank.reset(torch.tensor(rows))
        for row, wanted in enumerate(rows):
            if wanted:
                self.oracles[row].entries.clear()
                self.positions[row] = 0

    def reload(self) -> None:
        state = self.bank.state_dict()
        self.bank = self.new_bank()
        self.bank.load_state_dict(state)

    def check(self) -> None:
        if not self.bank.insertions:
            return
        for row, oracle in enumerate(self.oracles):
            held = self.bank.entries(row)
            assert held.counters.tolist() == [e["counter"] for e in oracle.entries]
            assert held.positions.tolist() == [e["position"] for e in oracle.entries]
            assert held.lengths.tolist() == [e["length"] for e in oracle.entries]
            assert len(set(held.slots.tolist())) == len(held)
            if oracle.entries:
                assert torch.equal(held.embeddings, torch.stack([e["embedding"] for e in oracle.entries]))
            assert len(self.bank._ledgers[row].index) == len(held)
            assert len(held) == 0 or self.bank.ends()[row] == int((held.positions + held.lengths)[-1])


lengths = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, CHUNK), min_size=n, max_size=n), min_size=ROWS, max_size=ROWS)
)
actions = st.one_of(
    st.tuples(st.just("insert"), lengths),
    st.tuples(st.just("insert"), lengths),
    st.tuples(st.just("retrieve"), st.integers(1, 6), st.booleans()),
    st.tuples(st.just("reset"), st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("reload")),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(policy=st.sampled_from(["retrieval_frequency", "fifo"]), steps=st.lists(actions, max_size=25))
def test_bank_equals_plain_python(policy: str, steps: list[tuple[Any, ...]]) -> None:
    pair = Pair(policy)
    for name, *arguments in steps:
        getattr(pair, name)(*arguments)
        pair.check()


def whole(chunks: int) -> list[list[int]]:
    return [[CHUNK] * chunks] * ROWS


def test_a_used_chunk_outlives_an_unused_one() -> None:
    pair = Pair("retrieval_frequency")
    pair.insert(whole(SLOTS))
    pair.bank.gather(torch.tensor([[2, 3]] * ROWS))
    pair.insert(whole(1))
    kept = pair.bank.entries(0).positions.tolist()
    assert 2 * CHUNK in kept and 3 * CHUNK in kept and 1 * CHUNK not in kept
    assert pair.bank.stats()["evictions"] == ROWS * 5


def test_four_dimensional_keys_give_four_dimensional_keys() -> None:
    bank = MemoryBank(1, 32, CHUNK)
    keys = torch.randn(1, HEADS, 8, SIZE)
    bank.insert(keys, keys, torch.eye(EMBED)[None, :2], torch.full((1, 2), CHUNK), torch.tensor([[0, 4]]))
    found = bank.gather(bank.recent(1))
    assert found is not None and found.keys.shape == (1, HEADS, CHUNK, SIZE)
    assert torch.equal(found.keys, keys[:, :, 4:])


def test_more_chunks_than_slots_keep_the_newest() -> None:
    bank = MemoryBank(1, 2 * CHUNK, CHUNK)
    keys = torch.randn(1, HEADS, 3 * CHUNK, SIZE)
    bank.insert(keys, keys, torch.eye(EMBED)[None, :3], torch.full((1, 3), CHUNK), torch.tensor([[0, 4, 8]]))
    assert bank.entries(0).positions.tolist() == [4, 8]


def test_controls_choose_what_they_say() -> None:
    pair = Pair("fifo")
    pair.insert(whole(5))
    assert pair.bank.recent(2).tolist() == [[4, 3]] * ROWS
    assert pair.bank.recent(2, before=torch.tensor([12, 20])).tolist() == [[2, 1], [4, 3]]
    first, again, other = (pair.bank.random(3, seeds) for seeds in ([1, 2], [1, 2], [3, 4]))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_half_precision_storage() -> None:
    bank = MemoryBank(1, 32, CHUNK, dtype=torch.bfloat16)
    keys = torch.randn(1, HEADS, CHUNK, SIZE)
    bank.insert(keys, keys, torch.eye(EMBED)[None, :1], torch.full((1, 1), CHUNK), torch.zeros(1, 1))
    found = bank.gather(bank.recent(1))
    assert found is not None and torch.equal(found.keys, keys.bfloat16())


def test_trained_index_finds_what_the_exact_one_finds() -> None:
    exact, trained = (MemoryBank(1, 800, CHUNK, index=name) for name in ("Flat", "IVF2,Flat"))
    mixer = torch.Generator().manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(1, 120, EMBED, generator=mixer), dim=-1)
    keys = torch.randn(1, HEADS, 120 * CHUNK, SIZE)
    for bank in (exact, trained):
        bank.insert(keys, keys, embeddings, torch.full((1, 120), CHUNK), torch.arange(0, 480, CHUNK)[None])
    assert "IVF" in type(trained._ledgers[0].index._index).__name__
    hits = [exact.search(e[None], 1)[1].item() == trained.search(e[None], 1)[1].item() for e in embeddings[0]]
    assert sum(hits) == len(hits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": torch.zeros(1, HEADS, 6, SIZE)}, "multiple of 4"),
        ({"embeddings": torch.zeros(1, 3, EMBED)}, "embeddings"),
        ({"embeddings": torch.full((1, 2, EMBED), float("nan"))}, "not finite"),
    ],
)
def test_bad_insertions_leave_the_bank_as_it_was(change: dict[str, torch.Tensor], words: str) -> None:
    bank = MemoryBank(1, 32, CHUNK)
    good = {
        "keys": torch.randn(1, HEADS, 8, SIZE),
        "values": torch.randn(1, HEADS, 8, SIZE),
        "embeddings": torch.eye(EMBED)[None, :2],
        "lengths": torch.full((1, 2), CHUNK),
        "positions": torch.tensor([[0, 4]]),
    }
    bank.insert(**good)
    with pytest.raises(UserError, match=words):
        bank.insert(**(good | change))
    assert len(bank.entries(0)) == 2
    with pytest.raises(UserError, match="head size"):
        bank.insert(**(good | {k: torch.randn(1, HEADS + 1, 8, SIZE) for k in ("keys", "values")}))
    assert len(bank.entries(0)) == 2


def test_a_bank_of_another_shape_is_refused() -> None:
    state = MemoryBank(1, 32, CHUNK).state_dict()
    with pytest.raises(UserError, match="memory.capacity=64"):
        MemoryBank(1, 64, CHUNK).load_state_dict(state)
    with pytest.raises(UserError, match="capacity=30"):
        MemoryBank(1, 30, CHUNK)
    with pytest.raises(UserError, match="memory.index='Nope'"):
        bank = MemoryBank(1, 32, CHUNK, index="Nope")
        keys = torch.zeros(1, 1, CHUNK, 1)
        bank.insert(keys, keys, torch.ones(1, 1, 1), torch.ones(1, 1), torch.zeros(1, 1))
