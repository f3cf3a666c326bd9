"""Chunks of other rows beside a row's own: which, where they stand, and what is told of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.memory_checks import check_memory
from lightning_memlong.bank import MemoryBank, Retrieved
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.errors import UserError
from lightning_memlong.retrieval import Retrieval, load_retriever

CHUNK, TOP_K, LAYERS = 4, 2, 2
HELD = [6, 4, 1, 0]
"""Chunks in the rows of the bank."""


class Letters:
    """A tokenizer whose tokens are letters."""

    def batch_decode(self, chunks: list[Tensor], clean_up_tokenization_spaces: bool = False) -> list[str]:
        return ["".join(chr(97 + int(t)) for t in chunk) for chunk in chunks]


def setting(**settings: Any) -> tuple[Retrieval, MemoryBank]:
    """Four rows, whose keys are 100 * row + number of the chunk, and random embeddings."""
    config = MemoryConfig(
        chunk_size=CHUNK, capacity=8 * CHUNK, top_k=TOP_K, retriever=RetrieverConfig("hashing"), **settings
    )
    retrieval = Retrieval(config, load_retriever(config.retriever), Letters())
    bank, widest = retrieval.new_bank(len(HELD)), max(HELD)
    number = torch.arange(widest * CHUNK) // CHUNK + 100 * torch.arange(len(HELD))[:, None]
    keys = number[None, :, None, :, None].expand(LAYERS, -1, 2, -1, 3).float()
    mixer = torch.Generator().manual_seed(0)
    shape = (len(HELD), widest, retrieval.retriever.size)
    embeddings = torch.nn.functional.normalize(torch.randn(shape, generator=mixer), dim=-1)
    lengths = CHUNK * (torch.arange(widest) < torch.tensor(HELD)[:, None]).long()
    bank.insert(keys, -keys, embeddings, lengths, (torch.arange(widest) * CHUNK).expand(len(HELD), -1))
    return retrieval, bank


def window(documents: list[int]) -> dict[str, Any]:
    ids = torch.randint(0, 20, (len(HELD), 2 * CHUNK), generator=torch.Generator().manual_seed(1))
    facts = {"length": torch.full((len(HELD),), 2 * CHUNK), "overlap": torch.zeros(len(HELD), dtype=torch.long)}
    return {"input_ids": ids, "offset": CHUNK * torch.tensor(HELD), "document_id": torch.tensor(documents), **facts}


def chunks(found: Retrieved) -> list[list[int | None]]:
    """What stands in each row: 100 * row + number of the chunk; None: nothing."""
    keys = found.keys[1, :, 0, ::CHUNK, 0].long().tolist()
    there = found.mask[:, ::CHUNK].tolist()
    return [[k if t else None for k, t in zip(*row, strict=True)] for row in zip(keys, there, strict=True)]


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize("selection", ["similarity", "recent", "random"])
def test_each_row_also_gets_what_its_query_finds_in_the_next_rows(selection: str, storage: str) -> None:
    retrieval, bank = setting(selection=selection, storage=storage)
    own = retrieval.retrieve(bank, window([7, 8, 9, 10]), count=False)
    found = retrieval.retrieve(bank, window([7, 8, 9, 10]), distractors=2)
    assert found is not None and own is not None
    assert torch.equal(found.keys, -found.values) and found.mask.shape == (4, 3 * TOP_K * CHUNK)
    assert not found.full and not found.empty and found.chunk_size == CHUNK
    rows = chunks(found)
    assert [row[2 * TOP_K :] for row in rows] == chunks(own), "its own stand next to the window"
    for row, held in enumerate(rows):
        for part, shift in ((held[:TOP_K], 2), (held[TOP_K : 2 * TOP_K], 1)):
            other = (row + shift) % 4
            there = [chunk for chunk in part if chunk is not None]
            assert len(set(there)) == min(TOP_K, HELD[other]) and {c // 100 for c in there} <= {other}
            if selection == "recent":
                assert there == [100 * other + n for n in range(HELD[other])][-TOP_K:], "up to the other one's end"
    again = retrieval.retrieve(bank, window([7, 8, 9, 10]), distractors=2)
    assert again is not None and chunks(again) == rows, "nothing is drawn that a resumed run would not draw"


def test_the_query_is_the_rows_own() -> None:
    retrieval, bank = setting()
    found = retrieval.retrieve(bank, window([7, 8, 9, 10]), distractors=1)
    assert found is not None
    query = bank.entries(0).embeddings[-retrieval.config.query_chunks :].mean(0)
    nearest = (bank.entries(1).embeddings @ query).topk(TOP_K).indices.sort().values
    assert chunks(found)[0][:TOP_K] == (100 + nearest).tolist()


def test_what_is_told_is_of_the_own_document_only() -> None:
    retrieval, bank = setting()
    found = retrieval.retrieve(bank, window([7, 8, 9, 10]), distractors=2)
    counted = [bank.entries(row).counters.tolist() for row in range(4)]
    other, same = setting()
    own = other.retrieve(same, window([7, 8, 9, 10]))
    assert counted == [same.entries(row).counters.tolist() for row in range(4)] and sum(map(sum, counted)) == 5
    assert found is not None and own is not None
    for name in ("entries", "positions"):
        assert torch.equal(getattr(found, name)[:, -TOP_K:], getattr(own, name))
        assert (getattr(found, name)[:, :-TOP_K] == -1).all()
    assert found.scores[:, :-TOP_K].isnan().all()
    torch.testing.assert_close(found.scores[:, -TOP_K:], own.scores, equal_nan=True)


def test_the_same_document_is_no_distractor_nor_is_one_nobody_reads() -> None:
    retrieval, bank = setting()
    found = retrieval.retrieve(bank, window([7, 7, -1, 10]), distractors=1)
    assert found is not None
    first = [[c for c in row[:TOP_K] if c is not None] for row in chunks(found)]
    assert first[0] == [] and first[1] == [] and first[2] == [] and len(first[3]) == TOP_K
    alone = retrieval.retrieve(bank, window([7, 7, 7, 7]), distractors=1)
    assert alone is not None and alone.mask.shape == (4, TOP_K * CHUNK), "no other document, nothing is added"


def test_rows_that_have_nothing_of_their_own_meet_others() -> None:
    retrieval, bank = setting()
    batch = window([7, 8, 9, 10]) | {"memory_start": torch.full((4,), 1000)}
    assert retrieval.retrieve(bank, batch) is None
    found = retrieval.retrieve(bank, batch, distractors=1)
    assert found is not None and (found.positions == -1).all() and bool(found.mask.any())
    bank.reset()
    assert retrieval.retrieve(bank, window([7, 8, 9, 10]), distractors=1) is None


def test_each_chunk_of_a_window_has_its_own() -> None:
    retrieval, bank = setting(granularity="chunk")
    found = retrieval.retrieve(bank, window([7, 8, 9, 10]), distractors=1)
    assert found is not None and found.positions.shape == (8, 2 * TOP_K)
    assert [{c // 100 for c in row[:TOP_K] if c is not None} for row in chunks(found)][:4] == [{1}, {1}, {2}, {2}]


def test_there_must_be_other_rows() -> None:
    data = type("Data", (), {"window": 256, "stride": 256, "batch_size": 2})()
    config = MemoryConfig(distractors=2)
    with pytest.raises(UserError, match=r"memory.distractors=2.*data.batch_size=2.*raise --data.batch_size"):
        check_memory(config, data, None, "fit")
    check_memory(config, data, None, "validate")
    with pytest.raises(UserError, match=r"memory.distractors=-1.*0 or more"):
        MemoryConfig(distractors=-1)
