"""The bank against a plain-Python model of itself: no entry lost, duplicated or mixed between rows."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_memlong.bank.eviction import POLICIES
from lightning_memlong.bank.index import make_index
from lightning_memlong.bank.memory_bank import MemoryBank
from lightning_memlong.bank.storage import ChunkStorage
from lightning_memlong.errors import UserError
from tests.integration.helpers import differences
from tests.reference import BankOracle, stored_as

CHUNK, SIZE, HEADS, LAYERS, EMBED = 4, 3, 2, 2, 5
ROWS, SLOTS = 2, 10


class Pair:
    """A bank and its oracles, driven together."""

    def __init__(
        self,
        policy: str,
        dtype: torch.dtype | None = None,
        storage: Any = "device",
        half_life: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {"policy": policy, "dtype": dtype, "storage": storage, "half_life": half_life}
        self.dtype, self.folder = dtype, folder
        self.bank = self.new_bank()
        self.oracles = [BankOracle(SLOTS, SLOTS * CHUNK, policy, half_life) for _ in range(ROWS)]
        self.positions = [0] * ROWS
        self.mixer = torch.Generator().manual_seed(0)

    def new_bank(self) -> MemoryBank:
        return MemoryBank(ROWS, SLOTS * CHUNK, CHUNK, **self.settings)

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
            oracle.count(expected, query[row])
            if found is not None:
                self.check_gathered(found, row, sorted(expected))

    def check_gathered(self, found: Any, row: int, places: list[int]) -> None:
        missing = found.entries.shape[1] - len(places)
        assert found.entries[row].tolist() == [-1] * missing + places
        for j, place in enumerate(places):
            entry = self.oracles[row].entries[place]
            tokens = slice((missing + j) * CHUNK, (missing + j + 1) * CHUNK)
            for name, read in (("keys", found.keys), ("values", found.values)):
                exact = self.dtype != torch.int8
                wanted = stored_as(entry[name], self.dtype)
                tolerance = {"atol": 0.0, "rtol": 0.0} if exact else {"atol": 1e-6, "rtol": 1e-5}
                torch.testing.assert_close(read[:, row, :, tokens], wanted, **tolerance)  # type: ignore[arg-type]
            assert found.mask[row, tokens].tolist() == [i < entry["length"] for i in range(CHUNK)]
            assert found.positions[row, missing + j] == entry["position"]
        assert not found.mask[row, : missing * CHUNK].any() and torch.isfinite(found.keys).all()

    def reset(self, rows: list[bool]) -> None:
        self.bank.reset(torch.tensor(rows))
        for row, wanted in enumerate(rows):
            if wanted:
                self.oracles[row].clear()
                self.positions[row] = 0

    def reload(self) -> None:
        state = self.bank.state_dict()
        self.bank = self.new_bank()
        self.bank.load_state_dict(state)

    def through_a_file(self) -> None:
        assert self.folder is not None
        file = self.bank.save(self.folder / "bank.safetensors", backbone="b")
        self.bank = MemoryBank.open(file, provenance={"backbone": "b"}, **self.settings)

    def move(self) -> None:
        """To another kind of storage, and on from there."""
        state = self.bank.state_dict()
        kinds = ["device", "host", "disk"]
        self.settings["storage"] = kinds[(kinds.index(self.settings["storage"]) + 1) % 3]
        self.bank = self.new_bank()
        self.bank.load_state_dict(state, "cpu")

    def send(self) -> None:
        """To another process, whose index must look at the vectors that arrived."""
        self.bank = pickle.loads(pickle.dumps(self.bank))

    def check(self) -> None:
        if not self.bank.insertions:
            return
        for row, oracle in enumerate(self.oracles):
            held = self.bank.entries(row)
            for name in ("counter", "score"):
                facts = torch.tensor([e[name] for e in oracle.entries], dtype=torch.float64)
                atol = 0.0 if name == "counter" and self.settings["half_life"] is None else 1e-6
                torch.testing.assert_close(getattr(held, f"{name}s"), facts, atol=atol, rtol=0)
            assert held.used.tolist() == [e["used"] for e in oracle.entries]
            assert held.positions.tolist() == [e["position"] for e in oracle.entries]
            assert held.lengths.tolist() == [e["length"] for e in oracle.entries]
            assert len(set(held.slots.tolist())) == len(held)
            if oracle.entries:
                assert torch.equal(held.embeddings, torch.stack([e["embedding"] for e in oracle.entries]))
            assert len(self.bank.row(row).index or ()) == len(held)
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
    st.tuples(st.just("through_a_file")),
    st.tuples(st.just("move")),
    st.tuples(st.just("send")),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    policy=st.sampled_from([name for name in POLICIES if name != "none"]),
    dtype=st.sampled_from([None, torch.bfloat16, torch.float16, torch.int8]),
    storage=st.sampled_from(["device", "host", "disk"]),
    half_life=st.sampled_from([None, 1.5, 20.0]),
    steps=st.lists(actions, max_size=25),
)
def test_bank_equals_plain_python(
    tmp_path_factory: pytest.TempPathFactory,
    policy: str,
    dtype: torch.dtype | None,
    storage: str,
    half_life: float | None,
    steps: list[tuple[Any, ...]],
) -> None:
    pair = Pair(policy, dtype, storage, half_life, tmp_path_factory.getbasetemp())
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


@pytest.mark.parametrize("copied", [lambda bank: pickle.loads(pickle.dumps(bank)), copy.deepcopy])
def test_a_copy_searches_the_vectors_it_holds(copied: Callable[[MemoryBank], MemoryBank]) -> None:
    """An index that looks at other memory than its bank's finds nothing that comes later, or what is there no more."""
    pair = Pair("fifo")
    pair.insert(whole(2))
    kept, pair.bank = pair.bank, copied(pair.bank)
    pair.insert(whole(2))
    kept.row(0).entries.embeddings.zero_()
    pair.retrieve(3, False)


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
    assert "IVF" in type(trained.row(0).index.faiss_index).__name__
    hits = [exact.search(e[None], 1)[1].item() == trained.search(e[None], 1)[1].item() for e in embeddings[0]]
    assert sum(hits) == len(hits)


@pytest.mark.parametrize("index", ["Flat", "HNSW16", "IVF2,Flat"])
def test_after_evictions_the_index_is_one_built_afresh(index: str) -> None:
    bank, mixer = MemoryBank(1, 120 * CHUNK, CHUNK, index=index), torch.Generator().manual_seed(2)
    for step in range(100):
        embeddings = torch.nn.functional.normalize(torch.randn(1, 2, EMBED, generator=mixer), dim=-1)
        keys = torch.zeros(1, 1, 2 * CHUNK, 1)
        at = torch.tensor([[2 * step, 2 * step + 1]]) * CHUNK
        bank.insert(keys, keys, embeddings, torch.full((1, 2), CHUNK), at)
    assert bank.evictions > 0
    held, used = bank.entries(0).embeddings, bank.row(0).index
    fresh = make_index(held.clone(), index)
    fresh.rebuild(len(held))
    if index == "IVF2,Flat":  # clusters were trained on what was held then; looking into all of them is exact
        for built in (used, fresh):
            built.faiss_index.nprobe = 2  # type: ignore[union-attr]
    queries = torch.randn(20, EMBED, generator=mixer)
    (scores, places), (expected, wanted) = used.search(queries, 5), fresh.search(queries, 5)
    assert places.tolist() == wanted.tolist()
    torch.testing.assert_close(scores, expected)


def good_insertion() -> dict[str, torch.Tensor]:
    mixer = torch.Generator().manual_seed(3)
    return {
        "keys": torch.randn(1, HEADS, 8, SIZE, generator=mixer),
        "values": torch.randn(1, HEADS, 8, SIZE, generator=mixer),
        "embeddings": torch.eye(EMBED)[None, :2],
        "lengths": torch.full((1, 2), CHUNK),
        "positions": torch.tensor([[0, 4]]),
    }


NOT_A_NUMBER, INFINITE = torch.randn(1, HEADS, 8, SIZE), torch.randn(1, HEADS, 8, SIZE)
NOT_A_NUMBER[0, 1, 3, 2], INFINITE[0, 0, 0, 0] = float("nan"), -float("inf")
BAD_INSERTIONS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "ragged window": ({"keys": torch.zeros(1, HEADS, 6, SIZE)}, "multiple of 4"),
    "too many embeddings": ({"embeddings": torch.zeros(1, 3, EMBED)}, "embeddings"),
    "another retriever's embeddings": ({"embeddings": torch.eye(EMBED + 1)[None, :2]}, "length 6 do not fit.*5"),
    "embedding not finite": ({"embeddings": torch.full((1, 2, EMBED), float("nan"))}, "embedding is not finite"),
    "keys not finite": ({"keys": NOT_A_NUMBER}, "keys are not all finite"),
    "values not finite": ({"values": INFINITE}, "values are not all finite"),
    "whole numbers": ({k: torch.ones(1, HEADS, 8, SIZE).long() for k in ("keys", "values")}, "torch.int64"),
    "other heads": ({k: torch.randn(1, HEADS + 1, 8, SIZE) for k in ("keys", "values")}, "head size"),
    "window larger than a row": (
        {
            "keys": torch.zeros(1, HEADS, 9 * CHUNK, SIZE),
            "values": torch.zeros(1, HEADS, 9 * CHUNK, SIZE),
            "embeddings": torch.zeros(1, 9, EMBED),
            "lengths": torch.full((1, 9), CHUNK),
            "positions": torch.zeros(1, 9, dtype=torch.long),
        },
        "does not fit into a row of 32",
    ),
}


@pytest.mark.parametrize("name", BAD_INSERTIONS)
def test_bad_insertions_leave_the_bank_as_it_was(name: str) -> None:
    change, words = BAD_INSERTIONS[name]
    bank, good = MemoryBank(1, 32, CHUNK), good_insertion()
    bank.insert(**good)
    before = bank.state_dict()
    with pytest.raises(UserError, match=words):
        bank.insert(**(good | change))
    assert differences(before, bank.state_dict()) == []


def test_a_query_of_another_retriever_is_told() -> None:
    bank = MemoryBank(1, 32, CHUNK)
    bank.insert(**good_insertion())
    with pytest.raises(UserError, match="length 9 do not fit the stored ones .5.*retriever"):
        bank.search(torch.zeros(1, 9), 2)


def test_a_policy_that_refuses_leaves_the_bank_as_it_was() -> None:
    bank, good = MemoryBank(1, 16, CHUNK, "none"), good_insertion()
    bank.insert(**good)
    bank.insert(**good)
    before = bank.state_dict()
    with pytest.raises(UserError, match="memory.policy='none'.*16 of memory.capacity=16 tokens"):
        bank.insert(**good)
    assert differences(before, bank.state_dict()) == []


def test_a_bank_of_another_shape_is_refused() -> None:
    bank, good = MemoryBank(1, 32, CHUNK), good_insertion()
    bank.insert(**good)
    state = bank.state_dict()
    for changed, words in (
        ({"capacity": 64}, "memory.capacity=64.*32"),
        ({"rows": 2}, "data.batch_size=2.*1"),
        ({"dtype": torch.int8}, "memory.dtype=torch.int8.*torch.float32"),
    ):
        other = MemoryBank(**({"rows": 1, "capacity": 32, "chunk_size": CHUNK} | changed))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=words):
            other.load_state_dict(state)
        assert other.insertions == 0 and other.state_dict()["shape"] is None
    with pytest.raises(UserError, match="capacity=30"):
        MemoryBank(1, 30, CHUNK)
    with pytest.raises(UserError, match="memory.index='Nope'"):
        MemoryBank(1, 32, CHUNK, index="Nope").insert(**good)


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_too_large_a_bank_is_told(where: Any, tmp_path: Path) -> None:
    sizes = torch.Size([100, 100, 1, 128, 128])
    with pytest.raises(UserError, match=f"memory.storage='{where}'.*cannot be had.*--memory.capacity"):
        ChunkStorage(sizes, 10**9, torch.float32, "cpu", where, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_chunk_lies_in_one_piece(where: Any, tmp_path: Path) -> None:
    storage = ChunkStorage(torch.Size((3, 2, 1, CHUNK, 5)), 4, torch.float32, "cpu", where, str(tmp_path))
    assert storage.keys.shape == (3, 2, 4, CHUNK, 5)
    assert all(t.select(2, 1).is_contiguous() for t in (storage.keys, storage.values))


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_what_is_read_meanwhile_is_what_was_there(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is there at once; an insertion that would write into its slots waits for it."""
    bank = MemoryBank(1, 16, CHUNK, "fifo", storage=storage)  # type: ignore[arg-type]
    first = good_insertion()
    bank.insert(**first)
    bank.insert(**first)
    go, read = threading.Event(), ChunkStorage._read_beside

    def slow(self: ChunkStorage, *places: torch.Tensor) -> Any:
        assert go.wait(10)
        return read(self, *places)

    monkeypatch.setattr(ChunkStorage, "_read_beside", slow)
    found = bank.gather(torch.tensor([[0, 1]]))
    assert found is not None and found.mask.all() and found.positions.tolist() == [[0, 4]]
    other = {k: good_insertion()[k] + 1 for k in ("keys", "values")}
    writing = threading.Thread(target=lambda: bank.insert(**(first | other)))
    writing.start()
    writing.join(0.2)
    assert writing.is_alive() and bank.evictions == 0
    go.set()
    writing.join(10)
    assert bank.evictions == 2 and torch.equal(found.keys, first["keys"]) and torch.equal(found.values, first["values"])


def test_disk_storage_leaves_no_file(tmp_path: Path) -> None:
    bank = MemoryBank(1, 32, CHUNK, storage="disk", storage_folder=str(tmp_path))
    bank.insert(**good_insertion())
    assert list(tmp_path.iterdir()) == [], "the file has no name: it is gone with the process"
    found = bank.gather(bank.recent(2))
    assert found is not None and torch.equal(found.keys, good_insertion()["keys"])
