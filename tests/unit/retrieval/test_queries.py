"""What windows and chunks retrieve with, against a plain loop over the text before them."""

import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from lightning_memlong.bank import MemoryBank
from lightning_memlong.retrieval.bm25 import SATURATION, BM25Retriever
from lightning_memlong.retrieval.queries import QueryBuilder, chunk_queries, search_any, window_queries

ROWS, CHUNK, CHUNKS, SIZE = 2, 4, 3, 6
NOTHING = [lambda: torch.empty(0, SIZE)] * ROWS


def units(count: int) -> torch.Tensor:
    return F.normalize(torch.randn(ROWS, count, SIZE, generator=torch.Generator().manual_seed(count)), dim=2)


def bank_with(embeddings: torch.Tensor) -> MemoryBank:
    """One chunk an embedding, in order."""
    count = embeddings.shape[1]
    bank = MemoryBank(ROWS, capacity=16 * CHUNK, chunk_size=CHUNK)
    keys = torch.arange(ROWS * count * CHUNK).float().view(ROWS, 1, count * CHUNK, 1)
    positions = torch.arange(0, count * CHUNK, CHUNK).expand(ROWS, -1)
    bank.insert(keys, -keys, embeddings, torch.full((ROWS, count), CHUNK), positions)
    return bank


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("overlap", [0, 2])
def test_each_chunk_asks_with_the_chunks_before_it(count: int, overlap: int) -> None:
    """Seven chunks are stored; the window of three begins ``overlap`` chunks before their end."""
    stored, window = units(7), units(CHUNKS)
    begin = 7 - overlap
    text = torch.cat([stored, window[:, overlap:]], dim=1)
    expected = [
        [F.normalize(text[row, max(0, begin + c - count) : begin + c].mean(0), dim=0) for c in range(CHUNKS)]
        for row in range(ROWS)
    ]
    offset, known = torch.full((ROWS,), begin * CHUNK), torch.full((ROWS,), overlap * CHUNK)
    queries = chunk_queries(bank_with(stored), window, offset, known, QueryBuilder(count), NOTHING)[:, :, 0]
    torch.testing.assert_close(queries, torch.stack([torch.stack(row) for row in expected]))
    whole = window_queries(bank_with(stored), offset, QueryBuilder(count), NOTHING)[:, 0, 0]
    torch.testing.assert_close(whole, queries[:, 0], msg="the first chunk asks what the window would")


def test_the_first_window_of_a_document_asks_with_itself_from_its_second_chunk_on() -> None:
    bank, window = bank_with(units(2)), units(CHUNKS)
    bank.reset()
    queries = chunk_queries(bank, window, torch.zeros(ROWS).long(), torch.zeros(ROWS).long(), QueryBuilder(1), NOTHING)[
        :, :, 0
    ]
    assert (queries[:, 0] == 0).all()
    torch.testing.assert_close(queries[:, 1:], window[:, :-1])


def test_several_searches_of_a_row_are_as_many_searches() -> None:
    stored, asked = units(7), units(CHUNKS)
    bank, other = bank_with(stored), bank_with(stored)
    scores, entries = bank.search(asked, top_k=2)
    assert scores.shape == entries.shape == (ROWS, CHUNKS, 2)
    record = bank.gather(entries, scores)
    assert record is not None and record.keys.shape == (ROWS * CHUNKS, 1, 2 * CHUNK, 1)
    for c in range(CHUNKS):
        alone_scores, alone = other.search(asked[:, c], top_k=2)
        assert torch.equal(entries[:, c], alone) and torch.equal(scores[:, c], alone_scores)
        single = other.gather(alone, alone_scores)
        assert single is not None
        for name in ("keys", "values", "mask", "scores", "entries", "positions"):
            assert torch.equal(getattr(record, name)[c::CHUNKS], getattr(single, name)), name
    for row in range(ROWS):
        assert torch.equal(bank.entries(row).counters, other.entries(row).counters)
        assert bank.entries(row).counters.sum() == 2 * CHUNKS


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_nearest_of_several_queries_counts(overlap: int) -> None:
    """Against a loop: an entry is as similar as it is to the nearest of the chunks that ask."""
    stored = units(9)
    bank = bank_with(stored)
    place = torch.full((ROWS,), (9 - overlap) * CHUNK)
    before = torch.full((ROWS,), 6 * CHUNK)
    queries = window_queries(bank, place, QueryBuilder(3, "max"), NOTHING)
    scores, entries = search_any(bank, queries, top_k=4, before=before)
    for row in range(ROWS):
        asking = stored[row, 9 - overlap - 3 : 9 - overlap]
        best = [(max(float(e @ a) for a in asking), i) for i, e in enumerate(stored[row, :6])]
        expected = sorted(best, reverse=True)[:4]
        assert entries[row, 0].tolist() == [i for _, i in expected]
        torch.testing.assert_close(scores[row, 0], torch.tensor([s for s, _ in expected]))


def test_fewer_chunks_than_queries_ask_all_the_same() -> None:
    bank = bank_with(units(2))
    place = torch.full((ROWS,), 2 * CHUNK)
    queries = window_queries(bank, place, QueryBuilder(5, "max"), NOTHING)
    assert queries.shape == (ROWS, 1, 5, SIZE)
    scores, entries = search_any(bank, queries, top_k=3, before=place)
    assert sorted(entries[0, 0].tolist()) == [0, 1] and scores.shape == (ROWS, 1, 2)


def test_memory_can_be_bounded_on_both_sides() -> None:
    stored = units(9)
    bank = bank_with(stored)
    query = stored[:, 8]
    before, after = torch.full((ROWS,), 7 * CHUNK), torch.full((ROWS,), 3 * CHUNK)
    for entries in (
        bank.search(query, 9, before, after)[1],
        bank.recent(9, before, after),
        bank.random(9, [0, 1], before, after),
    ):
        assert [sorted(row) for row in entries.tolist()] == [[3, 4, 5, 6]] * ROWS


def test_bm25_is_bm25() -> None:
    """Against the formula written out word by word; all chunks count as equally long."""
    texts = ["the cat sat on the mat", "the dog sat", "a cat and a dog and a cat", "nothing here", "the the the end"]
    retriever = BM25Retriever()
    stored = retriever.encode(texts)
    known = [Counter(re.findall(r"\b\w\w+\b", t)) for t in texts]
    for asking in ("the cat", "dog and mat"):
        query = retriever.as_query(retriever.encode([asking]), lambda: stored)
        expected = []
        for words in known:
            total = 0.0
            for word in set(re.findall(r"\b\w\w+\b", asking)):
                having = sum(word in w for w in known)
                rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
                total += rarity * words[word] * (SATURATION + 1) / (words[word] + SATURATION)
            expected.append(total)
        torch.testing.assert_close((stored @ query[0]), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_another_encoder_finds_the_same_keys_and_values() -> None:
    stored, other = units(7), units(5).repeat(1, 2, 1)[:, :7]
    bank = bank_with(stored)
    same = bank.with_embeddings(list(other))
    expected, asked = bank_with(other), units(3)[:, 0]
    one, two = (b.gather(b.search(asked, 3)[1]) for b in (same, expected))
    assert one is not None and two is not None
    assert torch.equal(one.keys, two.keys) and torch.equal(one.entries, two.entries)
    changed = torch.ones_like(one.keys[0, :, :CHUNK])
    bank.overwrite(0, changed, changed, bank.entries(0).positions[:1])
    seen = same.gather(torch.zeros(ROWS, 1, dtype=torch.long))
    assert seen is not None and torch.equal(seen.keys[0], changed), "nothing was copied"
    assert torch.equal(bank.entries(0).embeddings, stored[0]), "the bank itself is left alone"
