"""Banks that grow, rows alone, and taking back what was stored last."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong.bank.memory_bank import MemoryBank
from lightning_memlong.errors import UserError

CHUNK = 4


def fill(bank: MemoryBank, chunks: int, seed: int = 0) -> None:
    """So many more chunks into each row."""
    mixer = torch.Generator().manual_seed(seed)
    rows = bank.rows
    keys = torch.randn(2, rows, 2, chunks * CHUNK, 3, generator=mixer)
    embeddings = torch.nn.functional.normalize(torch.randn(rows, chunks, 5, generator=mixer), dim=-1)
    positions = bank.ends()[:, None] + torch.arange(chunks) * CHUNK
    bank.insert(keys, 2 * keys, embeddings, torch.full((rows, chunks), CHUNK), positions)
    for row in range(rows):
        bank.row(row).append_tokens(torch.arange(chunks * CHUNK) + 100 * row, int(positions[row, 0]))


def held(bank: MemoryBank, row: int) -> tuple[Tensor, Tensor]:
    """Keys and embeddings of a row, in the order of its entries."""
    entries = bank.entries(row)
    places = torch.full((bank.rows, len(entries)), -1)
    places[row] = torch.arange(len(entries))
    found = bank.gather(places, count=False)
    assert found is not None
    return found.keys[:, row], entries.embeddings.clone()


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_growing_changes_nothing_but_the_room(storage: str, dtype: torch.dtype | None) -> None:
    bank = MemoryBank(2, 8 * CHUNK, CHUNK, policy="fifo", dtype=dtype, storage=storage)  # type: ignore[arg-type]
    fill(bank, 6)
    fill(bank, 4, 1)  # evicts, so that slots are out of order
    bank.gather(torch.tensor([[0, 1], [2, 3]]))
    before = [held(bank, row) for row in (0, 1)]
    counters = bank.entries(1).counters.clone()
    query = torch.randn(2, 5)
    found = bank.search(query, 3)
    bank.grow(20 * CHUNK)
    assert bank.capacity == 20 * CHUNK and bank.slots == 20
    for row in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(held(bank, row), before[row], strict=True))
    assert torch.equal(bank.entries(1).counters, counters)
    assert all(torch.equal(a, b) for a, b in zip(bank.search(query, 3), found, strict=True))
    evicted = bank.evictions
    fill(bank, 20 - len(bank.entries(0)), 2)
    assert bank.evictions == evicted and len(bank.entries(0)) == 20
    bank.grow(CHUNK * 2)
    assert bank.capacity == 20 * CHUNK, "it never gets smaller"
    with pytest.raises(UserError, match="capacity=81.*multiple of chunk_size"):
        bank.grow(81)


def test_a_row_alone_shares_what_is_stored() -> None:
    bank = MemoryBank(3, 8 * CHUNK, CHUNK)
    fill(bank, 3)
    alone = bank.view(1)
    assert torch.equal(held(alone, 0)[0], held(bank, 1)[0])
    query = torch.randn(1, 5)
    assert torch.equal(alone.search(query, 2)[1][0], bank.search(query.expand(3, -1), 2)[1][1])
    others = held(bank, 0)[0], held(bank, 2)[0]
    fill(alone, 2, 1)
    assert len(bank.entries(1)) == 5 and torch.equal(held(alone, 0)[0], held(bank, 1)[0])
    assert torch.equal(held(bank, 0)[0], others[0]) and torch.equal(held(bank, 2)[0], others[1])
    assert bank.row(1).tokens.tolist() == [*range(100, 112), *range(8)]


def test_a_row_of_an_empty_bank_and_one_that_grows_meanwhile() -> None:
    bank = MemoryBank(3, 4 * CHUNK, CHUNK, policy="none")
    alone = bank.view(2)
    fill(alone, 2)
    assert [len(bank.entries(row)) for row in range(3)] == [0, 0, 2] and bank.insertions == alone.insertions == 2
    before = held(bank, 2)[0]
    bank.grow(9 * CHUNK)
    fill(alone, 5, 1)
    assert torch.equal(held(alone, 0)[0][..., : 2 * CHUNK, :], before) and len(bank.entries(2)) == 7
    fill(bank.view(1), 1, 2)
    assert torch.equal(held(alone, 0)[0], held(bank, 2)[0]) and bank.stats()["entries"] == 8


class Writer:
    """Stores for a while."""


def test_room_beyond_the_capacity_is_lent_and_given_back() -> None:
    bank = MemoryBank(1, 8 * CHUNK, CHUNK, policy="fifo")
    fill(bank, 8)
    before, writer = held(bank, 0), Writer()
    bank.row(0).acquire(writer)
    bank.reserve(0, 3)
    keys = torch.randn(2, 1, 2, 3 * CHUNK, 3)
    new = {"lengths": torch.full((1, 3), CHUNK), "positions": torch.tensor([[32, 36, 40]])}
    bank.insert(keys, keys, torch.nn.functional.normalize(torch.randn(1, 3, 5), dim=-1), **new, evict=False)
    assert len(bank.entries(0)) == 11 and not bank.evictions and bank.capacity == 8 * CHUNK
    bank.row(0).release(writer)
    assert all(torch.equal(a, b) for a, b in zip(held(bank, 0), before, strict=True))
    fill(bank, 2, 5)
    assert len(bank.entries(0)) <= 8 and bank.evictions, "it evicts at its capacity, as before"


def test_a_row_is_cut_at_a_place() -> None:
    bank = MemoryBank(1, 8 * CHUNK, CHUNK)
    fill(bank, 6)
    assert bank.row(0).truncate(13) == 12 and len(bank.entries(0)) == 3 and bank.ends().tolist() == [12]
    assert bank.row(0).tokens.tolist() == list(range(12))
    fill(bank, 2, 3)
    assert bank.entries(0).positions.tolist() == [0, 4, 8, 12, 16] and bank.entries(0).born.tolist() == [0, 1, 2, 3, 4]


def test_one_conversation_at_a_time() -> None:
    bank = MemoryBank(1, 8 * CHUNK, CHUNK)
    fill(bank, 2)
    one, other = Writer(), Writer()
    bank.row(0).acquire(one)
    fill(bank, 1, 1)
    bank.row(0).acquire(one)
    for refused in (lambda: bank.row(0).acquire(other), lambda: bank.save("/nowhere/bank")):
        with pytest.raises(UserError, match="open conversation.*close that conversation first"):
            refused()
    bank.row(0).release(other)
    assert len(bank.entries(0)) == 3, "what is not its own"
    bank.row(0).release(one)
    bank.row(0).acquire(other)
    assert len(bank.entries(0)) == 2
    bank.reset()
    bank.row(0).acquire(one)


def test_a_writer_that_is_gone_leaves_nothing() -> None:
    bank = MemoryBank(1, 8 * CHUNK, CHUNK)
    fill(bank, 2)
    writer = Writer()
    bank.row(0).acquire(writer)
    fill(bank, 1, 1)
    copied = pickle.loads(pickle.dumps(bank.row(0)))
    copied.require_unlocked()
    del writer
    bank.row(0).require_unlocked()
    assert len(bank.entries(0)) == 2 and bank.ends().tolist() == [2 * CHUNK]


def test_what_is_taken_out_again_makes_nothing_fade() -> None:
    bank = MemoryBank(1, 8 * CHUNK, CHUNK, half_life=1.0)
    fill(bank, 2)
    bank.gather(torch.tensor([[0, 1]]))
    before, writer = bank.entries(0).counters.clone(), Writer()
    bank.row(0).acquire(writer)
    fill(bank, 3, 1)
    bank.row(0).release(writer)
    assert torch.equal(bank.entries(0).counters, before) and float(before.sum()) == 2
    fill(bank, 1, 2)
    assert float(bank.entries(0).counters.sum()) == 1, "as by what stays"


@pytest.mark.parametrize("storage", ["device", "disk"])
def test_a_bank_filled_in_inference_mode_goes_on_outside(storage: Any) -> None:
    banks = [MemoryBank(1, 4 * CHUNK, CHUNK, storage=storage) for _ in range(2)]
    for bank, inference in zip(banks, (False, True), strict=True):
        with torch.inference_mode(inference):
            fill(bank, 3)
            bank.gather(torch.tensor([[0, 2]]))
        fill(bank, 3, 1)
        bank.gather(torch.tensor([[0, 2]]))
    for one, other in zip(held(banks[0], 0), held(banks[1], 0), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(banks[0].entries(0).counters, banks[1].entries(0).counters) and banks[1].evictions


def test_going_back_takes_out_what_came_later() -> None:
    bank = MemoryBank(1, 8 * CHUNK, CHUNK)
    fill(bank, 3)
    state = bank.state_dict()
    writer = Writer()
    bank.row(0).acquire(writer)
    fill(bank, 4, 1)
    bank.row(0).release(writer)
    after = bank.state_dict()
    for name, value in state["ledgers"][0].items():
        same = (
            torch.equal(value, after["ledgers"][0][name])
            if isinstance(value, Tensor)
            else value == after["ledgers"][0][name]
        )
        assert same, name
    fill(bank, 5, 2)
    assert len(bank.entries(0)) == 8 and not bank.evictions
    nothing = MemoryBank(1, 8 * CHUNK, CHUNK)
    nothing.row(0).acquire(writer)
    fill(nothing, 2)
    nothing.row(0).release(writer)
    assert len(nothing.entries(0)) == 0 and nothing.ends().tolist() == [0]


def test_a_file_says_what_it_was_made_of_and_with(tmp_path: Path) -> None:
    bank = MemoryBank(2, 8 * CHUNK, CHUNK, policy="none", dtype=torch.int8)
    fill(bank, 3)
    bank.provenance = {"backbone": "a", "retriever": "b"}
    bank.save(tmp_path / "bank")
    same = MemoryBank.open(tmp_path / "bank", policy="fifo")
    assert same.provenance == bank.provenance and torch.equal(same.row(1).tokens, bank.row(1).tokens)
    assert same.keeps_everything and same.dtype == torch.int8, "as it was, whatever the settings"
    with pytest.raises(UserError, match="backbone is 'a' there and 'c' here.*read the text again"):
        same.require_provenance({"backbone": "c"})
    MemoryBank(1, 8, 4).require_provenance({"backbone": "c"})  # it does not say


def test_all_queries_of_a_row_are_one_search_of_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """And find what each finds alone; a row with few that may be found gives few."""
    bank = MemoryBank(2, 8 * CHUNK, CHUNK)
    fill(bank, 6)
    queries = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    before, after = torch.tensor([6, 2]) * CHUNK, torch.tensor([0, 0])
    asked: list[int] = []
    for row in (0, 1):
        index = bank.row(row).index
        search = index.search  # type: ignore[union-attr]
        monkeypatch.setattr(index, "search", lambda q, k, search=search: asked.append(len(q)) or search(q, k))
    scores, entries = bank.search(queries, 4, before, after)
    assert asked == [3, 3] and scores.shape == entries.shape == (2, 3, 4)
    assert (entries[1] >= 0).sum(-1).tolist() == [2, 2, 2] and bool(scores[1, :, 2:].isnan().all())
    for query in range(3):
        alone_scores, alone = bank.search(queries[:, query], 4, before, after)
        assert torch.equal(alone, entries[:, query])
        torch.testing.assert_close(alone_scores, scores[:, query], equal_nan=True)


def test_many_queries_find_what_each_finds_alone() -> None:
    """From about 20 queries on FAISS multiplies matrices."""
    bank = MemoryBank(1, 8 * CHUNK, CHUNK)
    fill(bank, 8)
    queries = torch.randn(1, 40, 5, generator=torch.Generator().manual_seed(2))
    scores, entries = bank.search(queries, 3)
    for query in range(40):
        alone_scores, alone = bank.search(queries[:, query], 3)
        assert torch.equal(alone, entries[:, query])
        torch.testing.assert_close(alone_scores, scores[:, query])
