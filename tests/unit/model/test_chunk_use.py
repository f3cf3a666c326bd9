"""What a pass says of how its memory was used: where it is asked, and once."""

from typing import Any

import pytest
import torch

from lightning_memlong.attention import use
from lightning_memlong.bank import MemoryBank, Retrieved
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import attention_interface
from lightning_memlong.retrieval import Retrieval, load_retriever
from tests.conftest import tiny_llama

ROWS, TOKENS, CHUNK, TOP_K = 2, 16, 4, 3
EMBEDDED = torch.nn.functional.normalize(torch.randn(ROWS, 4, 256, generator=torch.Generator().manual_seed(0)), dim=-1)


class Numbers:
    """A tokenizer of numbers."""

    pad_token_id = bos_token_id = eos_token_id = 0

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [" ".join(str(int(i)) for i in row) for row in rows]


@pytest.fixture(autouse=True)
def every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use, "EVERY", 1)


def setting(model: MemLong, **settings: Any) -> tuple[Retrieval, MemoryBank, dict[str, Any]]:
    """A bank that has read a window of each row, and the next window."""
    facts = {"chunk_size": CHUNK, "capacity": 8 * CHUNK, "top_k": TOP_K, "use": "attention"}
    config = MemoryConfig(**(facts | settings), retriever=RetrieverConfig("hashing"))  # type: ignore[arg-type]
    retrieval = Retrieval(config, load_retriever(config.retriever), Numbers())
    bank = retrieval.new_bank(ROWS)
    ids = torch.randint(3, 97, (2, ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(ROWS, dtype=torch.long)
    batches = [
        {"input_ids": each, "length": torch.full((ROWS,), TOKENS), "offset": nothing + number * TOKENS,
         "overlap": nothing, "document_id": torch.arange(ROWS)}
        for number, each in enumerate(ids)
    ]  # fmt: skip
    retrieval.store(bank, model.capture(ids[0]), batches[0], EMBEDDED)
    return retrieval, bank, batches[1]


def counters(bank: MemoryBank) -> torch.Tensor:
    return torch.stack([bank.entries(row).counters for row in range(ROWS)])


def wrap(**settings: Any) -> MemLong:
    return MemLong(tiny_llama(), **({"memory_layer": 1} | settings)).eval()


WAYS = [{}, {"source": "single"}, {"position": "zero"}, {"position": "fixed"}, {"position": "fixed", "memory_near": 8},
        {"attention": "sdpa"}, {"attention": "flex"}, {"bos": 2}]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"granularity": "chunk"}, {"distractors": 1}], ids=str)
def test_a_window_counts_for_as_many_as_it_retrieved(settings: dict[str, Any], way: dict[str, Any]) -> None:
    model = wrap(**way)
    retrieval, bank, batch = setting(model, **settings)
    memory = retrieval.retrieve(bank, batch, distractors=settings.get("distractors", 0))
    assert memory is not None and not counters(bank).any(), "not yet"
    with torch.no_grad():
        output = model(batch["input_ids"], memory=memory)
    assert output.chunk_use is not None and output.chunk_use.shape == memory.entries.shape
    groups = len(memory.entries) // ROWS
    if output.attention_mass:
        mass = torch.stack([*output.attention_mass.values()]).mean((0, 2))
        torch.testing.assert_close(output.chunk_use.sum(1).view(ROWS, groups).mean(1), mass)
    retrieval.count_use(bank, memory, output.chunk_use)
    torch.testing.assert_close(counters(bank).sum(1), torch.full((ROWS,), groups * TOP_K, dtype=torch.float64))
    shares = counters(bank)[counters(bank) > 0]
    assert len(shares) >= ROWS * TOP_K and bool((shares % 1 != 0).any())


def test_kernels_tell_the_same() -> None:
    told = []
    for way in ({}, {"attention": "sdpa"}, {"attention": "flex"}):
        model = wrap(**way)
        retrieval, bank, batch = setting(model)
        with torch.no_grad():
            told.append(model(batch["input_ids"], memory=retrieval.retrieve(bank, batch)).chunk_use)
    for other in told[1:]:
        torch.testing.assert_close(other, told[0], atol=1e-5, rtol=1e-4)


def test_nobody_asks_unless_it_is_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    model = wrap()
    monkeypatch.setattr(attention_interface, "chunk_shares", refuse)
    for settings, count in (({"use": "retrieved"}, True), ({}, False)):
        retrieval, bank, batch = setting(model, **settings)
        memory = retrieval.retrieve(bank, batch, count=count)
        output = model(batch["input_ids"], memory=memory)
        retrieval.count_use(bank, memory, output.chunk_use)
        assert output.chunk_use is None and float(counters(bank).sum()) == count * ROWS * TOP_K


def test_checkpointing_runs_layers_twice_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return use.chunk_shares(*args)

    monkeypatch.setattr(attention_interface, "chunk_shares", counted)
    found, grads = [], []
    for checkpointing, wanted in ((False, True), (True, True), (True, False)):
        model = wrap(gradient_checkpointing=checkpointing).train()
        retrieval, bank, batch = setting(model)
        calls.clear()
        memory = retrieval.retrieve(bank, batch, count=wanted)
        output = model(batch["input_ids"], batch["input_ids"], memory=memory)
        output.loss.backward()
        assert len(calls) == wanted * len(model.retrieval_layers)
        retrieval.count_use(bank, memory, output.chunk_use)
        found.append(counters(bank))
        grads.append(torch.cat([p.grad.flatten() for p in model.trainable().values() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2]), "asking changes no gradient"


def test_tokens_that_choose_leave_chunks_unused() -> None:
    model = wrap()
    retrieval, bank, batch = setting(model, candidates=4, top_k=1)
    memory = retrieval.retrieve(bank, batch)
    with torch.no_grad():
        told = model(batch["input_ids"], memory=memory).chunk_use
    assert told is not None and told.shape == (ROWS, 4)
    retrieval.count_use(bank, memory, told)
    assert counters(bank).sum() == pytest.approx(ROWS * 4)


def test_what_a_row_chooses_from_does_not_depend_on_other_rows() -> None:
    """What is near is read by all, also where nothing lies far in any row."""
    model = wrap(position="fixed", memory_near=TOKENS, memory_distance=200)
    retrieval, bank, batch = setting(model, candidates=3, top_k=1)
    near, begin = torch.tensor([[3, 2, 1]]), torch.tensor([TOKENS])
    alone = retrieval.gather(bank.view(0), near, None, False, begin)
    beside = retrieval.gather(
        bank, torch.cat([near, torch.tensor([[0, 1, 2]])]), None, False, torch.tensor([TOKENS, 99])
    )
    with torch.no_grad():
        one, two = (model(batch["input_ids"][:n], memory=found).logits[0] for n, found in ((1, alone), (2, beside)))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_a_gate_that_is_shut_uses_nothing() -> None:
    model = wrap(fusion="gated")
    retrieval, bank, batch = setting(model)
    for gate, expected in ((0.0, 0.0), (-0.2, ROWS * TOP_K)):
        for each in model.gates.values():
            each.data.fill_(gate)
        memory = retrieval.retrieve(bank, batch)
        with torch.no_grad():
            retrieval.count_use(bank, memory, model(batch["input_ids"], memory=memory).chunk_use)
        assert float(counters(bank).sum()) == pytest.approx(expected)


@pytest.mark.parametrize("source", ["single", "per_layer"])
def test_reading_asks_all_layers_that_read(source: str) -> None:
    model = wrap(source=source)
    retrieval, bank, batch = setting(model)
    memory = retrieval.retrieve(bank, batch)
    with torch.no_grad():
        whole = model(batch["input_ids"], memory=memory)
    found = model.capture(batch["input_ids"], memory)
    torch.testing.assert_close(found["chunk_use"], whole.chunk_use)
    torch.testing.assert_close(found["keys"], whole.keys)
    assert set(model.capture(batch["input_ids"])) == {"keys", "values"}


def test_rows_that_have_ended_use_nothing() -> None:
    model = wrap()
    retrieval, bank, batch = setting(model)
    batch["length"] = torch.tensor([5, 0])
    memory = retrieval.retrieve(bank, batch)
    with torch.no_grad():
        retrieval.count_use(bank, memory, model(batch["input_ids"], memory=memory).chunk_use)
    assert counters(bank).sum(1).tolist() == pytest.approx([TOP_K, 0])


def test_a_step_that_does_not_tell_is_told() -> None:
    retrieval, bank, batch = setting(wrap())
    memory = retrieval.retrieve(bank, batch)
    with pytest.raises(UserError, match="memory.use='attention'.*retrieved.*chunk_use.*--memory.use retrieved"):
        retrieval.count_use(bank, memory, None)
    retrieval.count_use(bank, None, None)
    nothing = Retrieved(*[torch.zeros(ROWS, 0)] * 6, count_attention=True)
    retrieval.count_use(bank, nothing, None)
    with pytest.raises(UserError, match="memory.use='often'.*retrieved, attention"):
        MemoryConfig(use="often")  # type: ignore[arg-type]
