"""Selectors by name and by import path, on a bank and for texts."""

import pytest
import torch
from torch import Tensor

from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.errors import UserError
from lightning_memlong.retrieval import Chunks, Request, Retrieval, load_retriever, load_selector, retrieve_for
from lightning_memlong.retrieval.retriever import Retriever

CHUNK, ROWS, SIZE = 4, 4, 5


class Letters:
    """A tokenizer whose tokens are letters."""

    def batch_decode(self, chunks: list[Tensor], clean_up_tokenization_spaces: bool = False) -> list[str]:
        return ["".join(chr(97 + int(t)) for t in chunk) for chunk in chunks]


class CountsOfA(Retriever):
    """An encoder of one's own."""

    size = 2

    def __init__(self, config: RetrieverConfig) -> None:
        self.prompt = config.prompt

    def encode(self, texts: list[str]) -> Tensor:
        counts = torch.tensor([[float(text.count("a")), 1.0] for text in texts])
        return torch.nn.functional.normalize(counts, dim=1)


def oldest(request: Request) -> tuple[Tensor | None, Tensor]:
    """A selector of one's own: the first entries of each row."""
    places = torch.arange(request.top_k).expand(request.bank.rows, request.groups, -1)
    return None, places


def retrieval(**settings: object) -> Retrieval:
    config = MemoryConfig(chunk_size=CHUNK, capacity=16 * CHUNK, top_k=2, **settings)  # type: ignore[arg-type]
    return Retrieval(config, load_retriever(config.retriever), Letters())


def window(offset: int) -> dict[str, Tensor]:
    ids = torch.zeros(1, 2 * CHUNK, dtype=torch.long)
    facts = {"length": torch.tensor([2 * CHUNK]), "offset": torch.tensor([offset]), "overlap": torch.tensor([0])}
    return {"input_ids": ids, "document_id": torch.tensor([3]), **facts}


def filled(chosen: Retrieval) -> MemoryBank:
    bank = chosen.new_bank(1)
    for step in range(3):
        keys = torch.randn(1, 2, 2 * CHUNK, 3)
        chosen.store(bank, {"keys": keys, "values": keys}, window(step * 2 * CHUNK))
    return bank


@pytest.mark.parametrize(
    ("selection", "expected"), [("recent", [4, 5]), ("tests.unit.retrieval.test_selection.oldest", [0, 1])]
)
@pytest.mark.parametrize("granularity", ["window", "chunk"])
def test_a_selector_by_name_or_import_path_chooses(selection: str, expected: list[int], granularity: str) -> None:
    chosen = retrieval(selection=selection, granularity=granularity, retriever=RetrieverConfig("hashing"))
    bank = filled(chosen)
    found = chosen.retrieve(bank, window(6 * CHUNK))
    assert found is not None and found.entries.tolist() == [expected] * (2 if granularity == "chunk" else 1)
    asked = retrieve_for(chosen, bank, [torch.randn(1, chosen.retriever.size)] * 2)
    assert asked is not None and asked.entries.tolist() == [expected] * 2


def test_random_is_the_same_for_the_same_place() -> None:
    chosen = retrieval(selection="random", retriever=RetrieverConfig("hashing"))
    bank = filled(chosen)
    first, again = (chosen.choose(bank, window(6 * CHUNK))[1] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["best", "tests.unit.retrieval.test_selection.nothing", "os"])
def test_what_is_no_selector_is_told(name: str) -> None:
    with pytest.raises(
        UserError, match=f"memory.selection='{name}'.*similarity, recent, random, mix, neighbours, or the import path"
    ):
        load_selector(name)


# ---- with the newest, and with neighbours -----------------------------------------------------------------


def ragged() -> MemoryBank:
    """Rows of 9 entries with a gap in the document, 4, none, and 9 of which the last is short."""
    bank = MemoryBank(ROWS, capacity=16 * CHUNK, chunk_size=CHUNK)
    lengths = torch.full((ROWS, 9), CHUNK)
    lengths[1, 4:], lengths[2], lengths[3, 8] = 0, 0, 1
    keys = torch.randn(ROWS, 1, 9 * CHUNK, 2)
    embeddings = torch.nn.functional.normalize(torch.randn(ROWS, 9, SIZE), dim=2)
    bank.insert(keys, keys, embeddings, lengths, torch.arange(0, 9 * CHUNK, CHUNK).expand(ROWS, -1))
    bank.row(0).drop(torch.tensor([3]))
    return bank


def by_hand(
    bank: MemoryBank, row: int, queries: Tensor, name: str, top_k: int, newest: int, before: int, after: int
) -> dict[int, float]:
    """Places and similarities of one set (Q, E), in order of preference."""
    entries = bank.entries(row)
    begins, ends = entries.positions.tolist(), (entries.positions + entries.lengths).tolist()
    allowed = [i for i in range(len(entries)) if ends[i] <= before and begins[i] >= after]
    similar = {i: max(float(entries.embeddings[i] @ q) for q in queries) for i in allowed}
    best = sorted(allowed, key=lambda i: -similar[i])
    if name == "mix":
        order = allowed[::-1][:newest]
        order += [i for i in best if i not in order]
    else:
        order = []
        for hit in best:
            previous = [i for i in allowed if ends[i] == begins[hit]]
            following = [i for i in allowed if begins[i] == ends[hit]]
            order += [i for i in [hit, *previous, *following] if i not in order]
    return {i: similar[i] for i in order[:top_k]}


@pytest.mark.parametrize("name", ["mix", "neighbours"])
@pytest.mark.parametrize("top_k", [1, 3, 4, 20])
@pytest.mark.parametrize(("before", "after"), [(9, 0), (7, 2), (6, 5), (0, 0)])
@pytest.mark.parametrize("count", [1, 3])
def test_chosen_as_by_hand(name: str, top_k: int, before: int, after: int, count: int) -> None:
    torch.manual_seed(top_k + before)
    bank, newest = ragged(), min(2, top_k)
    queries = torch.nn.functional.normalize(torch.randn(ROWS, 3, count, SIZE), dim=3)
    until, since = torch.full((ROWS,), before * CHUNK), torch.full((ROWS,), after * CHUNK)
    request = Request(
        bank, top_k, 3, until, since if after else None, newest, lambda: queries, lambda group: [0] * ROWS
    )
    scores, entries = load_selector(name)(request)
    assert scores is not None and scores.shape == entries.shape and entries.shape[:2] == (ROWS, 3)
    for row in range(ROWS):
        for group in range(3):
            expected = by_hand(bank, row, queries[row, group], name, top_k, newest, before * CHUNK, after * CHUNK)
            found = entries[row, group]
            assert found.tolist() == [*expected, *[-1] * (len(found) - len(expected))]
            torch.testing.assert_close(scores[row, group][found >= 0], torch.tensor([*expected.values()]))
            assert scores[row, group][found < 0].isnan().all()
    if before == 9 and top_k == 4:
        assert (entries[[0, 1, 3]] >= 0).all() and (entries[2] < 0).all(), "as many as wanted where there are enough"


def test_a_neighbour_stands_right_beside_the_hit() -> None:
    bank = ragged()
    queries = bank.entries(0).embeddings[2].expand(ROWS, 1, 1, -1)  # beside it, an entry was dropped
    everything = torch.full((ROWS,), 9 * CHUNK)
    request = Request(bank, 2, 1, everything, None, 2, lambda: queries, lambda group: [0] * ROWS)
    assert load_selector("neighbours")(request)[1][0, 0].tolist() == [2, 1]


@pytest.mark.parametrize("selection", ["mix", "neighbours"])
@pytest.mark.parametrize("granularity", ["window", "chunk"])
def test_windows_and_texts_are_chosen_for_alike(selection: str, granularity: str) -> None:
    chosen = retrieval(selection=selection, newest=0.5, granularity=granularity, retriever=RetrieverConfig("bm25"))
    assert chosen.retrieve(chosen.new_bank(1), window(0)) is None
    bank = filled(chosen)
    found = chosen.retrieve(bank, window(6 * CHUNK))
    asked = retrieve_for(chosen, bank, [torch.randn(1, chosen.retriever.size)] * 2)
    for record, sets in ((found, 2 if granularity == "chunk" else 1), (asked, 2)):
        assert record is not None and record.entries.shape == (sets, 2) and (record.entries >= 0).all()
        assert record.scores.isfinite().all()
        assert selection != "mix" or (record.entries == 5).any(dim=1).all(), "the newest is among them"


# ---- encoders ---------------------------------------------------------------------------------------------


def test_an_encoder_by_import_path_embeds() -> None:
    chosen = retrieval(retriever=RetrieverConfig("tests.unit.retrieval.test_selection.CountsOfA"))
    assert isinstance(chosen.retriever, CountsOfA)
    batch = window(0)
    batch["input_ids"][0, CHUNK:] = 1
    embeddings = chosen.embed(batch)
    assert embeddings[0].tolist() == chosen.retriever.encode(["aaaa", "bbbb"]).tolist()
    with pytest.raises(UserError, match="memory.retriever.name='tests.nowhere.Encoder'.*import path of a class"):
        load_retriever(RetrieverConfig("tests.nowhere.Encoder"))


def test_chunks_are_decoded_only_when_somebody_reads_them() -> None:
    asked: list[int] = []

    def decode(chunks: object) -> list[str]:
        asked.append(1)
        return ["x"]

    chunks = Chunks(torch.zeros(1, 3, dtype=torch.long), torch.tensor([2]), decode, torch.ones(1, 3, 4))
    hidden = load_retriever(RetrieverConfig("hidden"), 4)
    assert hidden.needs_hidden and torch.allclose(hidden.embed(chunks), torch.full((1, 4), 0.5)) and not asked
    assert chunks.texts == ["x"] and chunks.texts and asked == [1]
