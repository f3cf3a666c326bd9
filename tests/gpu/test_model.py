"""The whole model with its bank: what must always hold, on each device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong import MemLong, MemoryBank
from lightning_memlong.bank import Retrieved
from lightning_memlong.config import MemoryConfig, RetrieverConfig, TuningConfig
from lightning_memlong.generation import LocalContext
from lightning_memlong.retrieval import Retrieval, load_retriever
from tests.conftest import tiny_llama

CHUNK, WINDOW, VOCABULARY = 4, 16, 97


class Words:
    """A tokenizer whose tokens are numbers."""

    bos_token_id = eos_token_id = pad_token_id = 0
    all_special_ids = (0,)
    chat_template = None

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [int(word) for word in texts.split()]}
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return [self.decode(row) for row in rows]


def ids(count: int, seed: int, rows: int = 2) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def retrieval_of(**settings: Any) -> Retrieval:
    config = MemoryConfig(
        chunk_size=CHUNK, capacity=16 * CHUNK, top_k=2, retriever=RetrieverConfig("hashing"), **settings
    )
    return Retrieval(config, load_retriever(config.retriever), Words())


def window(tokens: Tensor, offset: int, device: torch.device) -> dict[str, Tensor]:
    rows, count = tokens.shape
    facts = {"length": torch.full((rows,), count), "offset": torch.full((rows,), offset)}
    facts |= {"overlap": torch.zeros(rows, dtype=torch.long), "document_id": torch.arange(rows)}
    return {"input_ids": tokens.to(device), "labels": tokens.to(device), **facts}


def read(model: MemLong, text: Tensor, device: torch.device, **settings: Any) -> tuple[list[Tensor], MemoryBank]:
    """Logits of each window of a text, with memory of those before it; and the bank."""
    retrieval = retrieval_of(**settings)
    bank, logits = retrieval.new_bank(len(text)), []
    for offset in range(0, text.shape[1], WINDOW):
        batch = window(text[:, offset : offset + WINDOW], offset, device)
        output = model(batch["input_ids"], memory=retrieval.retrieve(bank, batch))
        retrieval.store(bank, {"keys": output.keys, "values": output.values}, batch)
        logits.append(output.logits.detach().cpu())
    return logits, bank


@pytest.mark.parametrize("source", ["single", "per_layer"])
def test_an_empty_bank_is_the_backbone(device: torch.device, source: str) -> None:
    text = ids(WINDOW, 0).to(device)
    plain = tiny_llama().to(device)(text).logits
    model = MemLong(tiny_llama(), memory_layer=1, source=source).to(device).eval()
    torch.testing.assert_close(model(text).logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["window", "chunk"])
@pytest.mark.parametrize("fusion", ["joint", "gated"])
def test_devices_agree_and_nothing_sees_ahead(device: torch.device, granularity: str, fusion: str) -> None:
    text = ids(4 * WINDOW, 1)
    model = MemLong(tiny_llama(), memory_layer=1, fusion=fusion).eval()
    for gate in model.gates.values():
        gate.data.fill_(0.5)
    with torch.no_grad():
        expected = read(model, text, torch.device("cpu"), granularity=granularity)[0]
        model.to(device)
        found = read(model, text, device, granularity=granularity)[0]
        changed = text.clone()
        place = 3 * WINDOW + 9
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        after = read(model, changed, device, granularity=granularity)[0]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
    before = slice(None), slice(0, place - 3 * WINDOW)
    assert torch.equal(torch.cat(found[:3]), torch.cat(after[:3]))
    torch.testing.assert_close(found[3][before], after[3][before], atol=1e-5, rtol=1e-5)
    assert not torch.equal(found[3], after[3])


@pytest.mark.parametrize("fusion", ["joint", "gated"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_checkpointing_changes_no_gradient(device: torch.device, fusion: str, mode: str) -> None:
    text, results = ids(2 * WINDOW, 2), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tuning = TuningConfig(mode=mode, lora_rank=2, lora_dropout=0.0)  # type: ignore[arg-type]
        model = MemLong(
            tiny_llama(), memory_layer=1, fusion=fusion, tuning=tuning, gradient_checkpointing=checkpointing
        ).to(device)
        for gate in model.gates.values():
            gate.data.fill_(0.3)
        bank = read(model.eval(), text[:, :WINDOW], device)[1]
        batch = window(text[:, WINDOW:], WINDOW, device)
        memory = retrieval_of().retrieve(bank, batch)
        assert memory is not None
        output = model.train()(batch["input_ids"], batch["labels"], memory=memory)
        output.loss.backward()
        grads = {name: p.grad for name, p in model.trainable().items() if p.grad is not None}
        results.append((output.loss.detach(), grads))
    (loss, grads), (again, recomputed) = results
    torch.testing.assert_close(loss, again)
    assert grads.keys() == recomputed.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(grad, recomputed[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_storage_places_give_the_same(device: torch.device, dtype: str) -> None:
    text, model = ids(6 * WINDOW, 3), MemLong(tiny_llama(), memory_layer=1).to(device).eval()
    with torch.no_grad():
        found = {
            place: read(model, text, device, storage=place, dtype=dtype)[0] for place in ("device", "host", "disk")
        }
    for place in ("host", "disk"):
        for one, other in zip(found["device"], found[place], strict=True):
            assert torch.equal(one, other), place


def test_a_bank_moves_between_devices(device: torch.device, tmp_path: Path) -> None:
    text, model = ids(4 * WINDOW, 4), MemLong(tiny_llama(), memory_layer=1).to(device).eval()
    with torch.no_grad():
        bank = read(model, text, device)[1]
    everything = torch.arange(len(bank.entries(0)))[None].expand(2, -1)
    here = bank.gather(everything, count=False)
    bank.save(tmp_path / "bank")
    settings = {"policy": "fifo"}
    there = MemoryBank.open(tmp_path / "bank", "cpu", **settings)
    there.save(tmp_path / "again")
    back = MemoryBank.open(tmp_path / "again", device, **settings)
    for other in (there.gather(everything, count=False), back.gather(everything, count=False)):
        assert here is not None and other is not None
        assert torch.equal(here.keys.cpu(), other.keys.cpu()) and torch.equal(here.values.cpu(), other.values.cpu())
        assert torch.equal(here.mask.cpu(), other.mask.cpu())
    state = bank.state_dict()
    loaded = MemoryBank(2, bank.capacity, CHUNK)
    loaded.load_state_dict(state, device)
    again = loaded.gather(everything, count=False)
    assert again is not None and again.keys.device.type == device.type and torch.equal(again.keys, here.keys)


def stacked(sets: list[Retrieved]) -> Retrieved:
    names = ("keys", "values", "mask", "scores", "entries", "positions")
    return Retrieved(*(torch.cat([getattr(s, n) for s in sets], -4 if n in ("keys", "values") else 0) for n in names))


@pytest.mark.parametrize("storage", ["device", "host"])
def test_written_tokens_are_as_if_all_were_known(device: torch.device, storage: str) -> None:
    model = MemLong(tiny_llama(), memory_layer=1).to(device).eval()
    model.use_memory(retrieval_of(storage=storage).config, Words())
    bank = model.read(Words().decode(ids(40, 5, 1)[0]), window=WINDOW, progress=False)
    prompt, then = ids(8, 6, 1).to(device), ids(8, 7, 1).to(device)
    context = LocalContext(model.long_context, bank, 0, 32)
    context.retrieve_for_prompt(model.long_context.embed_texts(["5 6 7"])[0])
    logits, sets = [context.logits(prompt)[0, 0]], [context.retrieved]
    for place in range(then.shape[1] - 1):
        logits.append(context.logits(torch.cat([prompt, then[:, : place + 1]], 1))[0, 0])
        if place % CHUNK == 0:
            sets.append(context.retrieved)
    groups = [sets[0]] * 2 + sets[1:3]
    assert all(s is not None for s in groups)
    with torch.no_grad():
        whole = model(torch.cat([prompt, then], 1), memory=stacked(groups)).logits[0, 7:-1]  # type: ignore[arg-type]
    torch.testing.assert_close(torch.stack(logits), whole, atol=1e-3, rtol=1e-3)


def test_generate_writes_on_the_device(device: torch.device) -> None:
    model = MemLong(tiny_llama(), memory_layer=1).eval()
    model.use_memory(retrieval_of().config, Words())
    texts = []
    for place in ("cpu", device):
        model.to(place)
        bank = model.read(Words().decode(ids(60, 8, 1)[0]), window=WINDOW, progress=False)
        texts.append(model.generate("4 5 6", bank, window=WINDOW, max_new_tokens=30, min_new_tokens=30))
    assert texts[0] == texts[1] and len(texts[0].split()) == 30, "the local context was moved into the bank on the way"
