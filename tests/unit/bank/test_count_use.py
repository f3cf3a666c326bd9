"""Entries that count by how much they were used, and what a row then forgets."""

import pytest
import torch

from lightning_memlong.bank import MemoryBank

CHUNK = 4
NAN = float("nan")


def filled(chunks: int, rows: int = 1, **settings: object) -> MemoryBank:
    bank = MemoryBank(rows, 10 * CHUNK, CHUNK, **settings)  # type: ignore[arg-type]
    store(bank, chunks)
    return bank


def store(bank: MemoryBank, chunks: int) -> None:
    keys = torch.zeros(bank.rows, 1, chunks * CHUNK, 2)
    embeddings = torch.nn.functional.normalize(torch.ones(bank.rows, chunks, 3), dim=-1)
    positions = bank.ends()[:, None] + torch.arange(chunks) * CHUNK
    bank.insert(keys, keys, embeddings, torch.full((bank.rows, chunks), CHUNK), positions)


def test_a_rows_shares_sum_to_what_it_retrieved() -> None:
    bank = filled(5, rows=2)
    store(bank, 1)
    entries = torch.tensor([[-1, 0, 2, 4], [-1, -1, 1, 3]])
    use = torch.tensor([[0.9, 0.1, 0.0, 0.3], [0.5, 0.5, 0.02, 0.02]])
    scores = torch.tensor([[NAN, 0.5, 0.5, 1.0], [NAN, NAN, NAN, 0.8]])
    bank.count_use(entries, use, scores)
    first, second = bank.entries(0), bank.entries(1)
    assert first.counters.tolist() == pytest.approx([0.75, 0, 0, 0, 2.25, 0])
    assert first.scores.tolist() == pytest.approx([0.375, 0, 0, 0, 2.25, 0])
    assert first.used.tolist() == [5, 1, 2, 3, 5, 5], "entry 2 was retrieved, but nothing looked at it"
    assert second.counters.tolist() == pytest.approx([0, 1, 0, 1, 0, 0])
    assert second.scores.tolist() == pytest.approx([0, 0, 0, 0.8, 0, 0])


def test_each_set_of_a_row_counts() -> None:
    bank = filled(3, rows=2)
    entries = torch.tensor([[0, 1], [1, 2], [-1, 0], [-1, -1]])
    bank.count_use(entries, torch.tensor([[3.0, 1.0], [1.0, 0.0], [0.2, 0.1], [1.0, 1.0]]), torch.zeros(4, 2))
    assert bank.entries(0).counters.tolist() == pytest.approx([1.5, 2.5, 0])
    assert bank.entries(1).counters.tolist() == pytest.approx([1, 0, 0])


def test_what_is_not_used_at_all_counts_nothing() -> None:
    bank = filled(3)
    state = bank.state_dict()["ledgers"][0]
    bank.count_use(torch.tensor([[0, 1]]), torch.zeros(1, 2), torch.ones(1, 2))
    bank.count_use(torch.tensor([[-1, -1]]), torch.ones(1, 2), torch.ones(1, 2))
    after = bank.state_dict()["ledgers"][0]
    assert all(torch.equal(state[name], after[name]) for name in ("counters", "scores", "used"))


def test_even_shares_are_retrievals() -> None:
    banks = [filled(6, half_life=3.0) for _ in range(2)]
    entries, scores = torch.tensor([[0, 2, 5]]), torch.tensor([[0.1, 0.7, 0.4]])
    for _ in range(2):
        banks[0].gather(entries, scores)
        banks[1].count_use(entries, torch.full((1, 3), 0.11), scores)
        for bank in banks:
            store(bank, 1)
    for name in ("counters", "scores", "used"):
        one, other = (getattr(bank.entries(0), name) for bank in banks)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("policy", "stays"),
    [("retrieval_frequency", [1, 2, 3, 8, 9]), ("score", [2, 3, 7, 8, 9]), ("lru", [2, 3, 7, 8, 9])],
)
def test_what_was_retrieved_but_never_attended_to_goes_first(policy: str, stays: list[int]) -> None:
    asked, scores = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.full((1, 6), 0.5)
    attended = torch.tensor([[0.2, 0.2, 0.2, 0.0, 0.0, 0.0]])
    kept = {}
    for by_attention in (False, True):
        bank = filled(10, policy=policy)
        bank.gather(asked, scores, count=not by_attention)
        if by_attention:
            bank.count_use(asked, attended, scores)
        bank.gather(torch.tensor([[7, 8]]), torch.ones(1, 2))
        store(bank, 1)
        kept[by_attention] = (bank.entries(0).positions[:-1] // CHUNK).tolist()
    assert kept == {False: [5, 6, 7, 8, 9], True: stays}
