"""Selectors by name and by import path, on a bank and for texts."""

import pytest
import torch
from torch import Tensor

from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.errors import UserError
from lightning_memlong.retrieval import Chunks, Request, Retrieval, load_retriever, load_selector, retrieve_for
from lightning_memlong.retrieval.retriever import Retriever

CHUNK = 4


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


def ragged() -> MemoryBank:
    """Two rows of 6 and 3 entries; in row 0 the fourth chunk (positions 12 to 16) was never stored."""
    bank = MemoryBank(2, chunk_size=CHUNK, capacity=16 * CHUNK)
    angles = torch.tensor([[0.1, 1.5, 0.2, 0.3, 1.4, 1.3, 0.5], [1.5, 0.0, 1.4, 0, 0, 0, 0]])
    for chunk in range(7):
        keys = torch.randn(2, 1, CHUNK, 3)
        lengths = torch.tensor([[0 if chunk == 3 else CHUNK], [CHUNK if chunk < 3 else 0]])
        at = angles[:, chunk : chunk + 1]
        embeddings = torch.stack([at.cos(), at.sin()], dim=-1)
        bank.insert(keys, keys, embeddings, lengths, torch.full((2, 1), chunk * CHUNK))
    return bank


def asked(bank: MemoryBank, name: str, top_k: int, before: int = 999, newest: int = 0) -> list[list[list[int]]]:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, :, None].expand(2, 2, 1, 2)
    request = Request(bank, top_k, 2, torch.tensor([before, 999]), None, lambda: queries, lambda _: [0, 0], newest)
    scores, entries = load_selector(name)(request)
    assert scores is not None and scores.shape == entries.shape
    return [[[e for e in group.tolist() if e >= 0] for group in row] for row in entries]


def test_mix_takes_the_newest_and_then_the_most_similar() -> None:
    bank = ragged()
    # Row 0 holds angles 0.1, 1.5, 0.2, 1.4, 1.3, 0.5; the groups ask for small angles and for large ones.
    assert asked(bank, "mix", 3, newest=1) == [[[5, 0, 2], [5, 1, 3]], [[2, 1, 0], [2, 0, 1]]]
    assert asked(bank, "mix", 3, before=5 * CHUNK, newest=2)[0] == [[3, 2, 0], [3, 2, 1]]
    assert asked(bank, "mix", 2) == asked(bank, "similarity", 2), "none of the newest"


def test_neighbours_are_beside_a_hit_in_the_document_and_can_be_found() -> None:
    bank = ragged()
    # Entry 3 follows entry 2 in the row, not in the document: a chunk between them is missing.
    assert asked(bank, "neighbours", 4)[0] == [[0, 1, 2, 5], [1, 0, 2, 3]]
    assert asked(bank, "neighbours", 4)[1] == [[1, 0, 2], [0, 1, 2]]
    assert asked(bank, "neighbours", 9, before=2 * CHUNK)[0] == [[0, 1], [1, 0]], "nothing that is not to be found"
    both = asked(bank, "neighbours", 9)[0]
    assert sorted(both[0]) == sorted(both[1]) == [0, 1, 2, 3, 4, 5]


def test_more_of_the_newest_than_chunks_are_told() -> None:
    with pytest.raises(UserError, match="memory.newest=4.*from 0 to memory.top_k=3"):
        MemoryConfig(selection="mix", newest=4)
    with pytest.raises(UserError, match="memory.candidates=2.*at least memory.top_k=3"):
        MemoryConfig(candidates=2)
