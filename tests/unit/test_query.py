"""What windows and chunks retrieve with, against a plain loop over the text before them."""

import pytest
import torch
import torch.nn.functional as F

from lightning_memlong.bank import MemoryBank
from lightning_memlong.query import Asking, chunk_queries, window_queries

ROWS, CHUNK, CHUNKS, SIZE = 2, 4, 3, 6


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
    offset, fresh = torch.full((ROWS,), begin * CHUNK), torch.full((ROWS,), overlap * CHUNK)
    queries = chunk_queries(bank_with(stored), window, offset, fresh, Asking(count))[:, :, 0]
    torch.testing.assert_close(queries, torch.stack([torch.stack(row) for row in expected]))
    whole = window_queries(bank_with(stored), offset, Asking(count))[:, 0, 0]
    torch.testing.assert_close(whole, queries[:, 0], msg="the first chunk asks what the window would")


def test_the_first_window_of_a_document_asks_with_itself_from_its_second_chunk_on() -> None:
    bank, window = bank_with(units(2)), units(CHUNKS)
    bank.reset()
    queries = chunk_queries(bank, window, torch.zeros(ROWS).long(), torch.zeros(ROWS).long(), Asking(1))[:, :, 0]
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
