"""Where keys and values lie makes no difference, and a bank moves between machines."""

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memlong.bank import MemoryBank
from tests.gpu.tiny import CHUNK, ROWS, batches, documents, model_on, read, retrieval

SIMULATED = True

PLACES = ["device", "host", "disk"]


def gathered(bank: MemoryBank) -> list[torch.Tensor]:
    """Keys, values and mask of some entries."""
    found = bank.gather(torch.tensor([[0, 3], [2, -1]]), count=False)
    assert found is not None
    return [found.keys.cpu(), found.values.cpu(), found.mask.cpu()]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "int8"])
def test_places_of_storage_agree(dtype: str, device: torch.device, tmp_path: Path) -> None:
    results = []
    for storage in PLACES:
        works = retrieval(storage=storage, storage_folder=str(tmp_path), dtype=dtype, capacity=64)
        logits, bank = read(model_on(device), works, documents(), device)
        assert bank.evictions > 0
        found = bank.gather(torch.zeros(ROWS, 1, dtype=torch.long), count=False)
        assert found is not None and found.keys.device.type == found.mask.device.type == device.type
        results.append((logits, *gathered(bank)))
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            # Device and host quantise alike, but not to the last bit on two processors.
            torch.testing.assert_close(another, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("storage", PLACES)
def test_a_bank_is_saved_here_and_opened_there(storage: str, device: torch.device, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"storage": storage, "storage_folder": str(tmp_path)}
    model, works = model_on(device), retrieval(**settings)
    _, bank = read(model, works, documents(), device)
    file = bank.save(tmp_path / "bank.safetensors")
    on_cpu = MemoryBank.open(file, "cpu")
    back = works.new_bank(ROWS)
    back.load_state_dict(on_cpu.state_dict(), device)
    for other in (on_cpu, back):
        for one, another in zip(gathered(bank), gathered(other), strict=True):
            assert torch.equal(one, another)
        assert torch.equal(other.entries(1).counters, bank.entries(1).counters)
    batch = batches(documents(2), device)[0] | {"offset": bank.ends()}
    here, there = (model(batch["input_ids"], memory=works.retrieve(b, dict(batch), False)).logits for b in (bank, back))
    assert torch.equal(here, there)


def test_a_bank_grows_and_takes_back(device: torch.device) -> None:
    _, bank = read(model_on(device), retrieval(), documents(), device)
    before = gathered(bank)
    for row in range(ROWS):
        bank.row(row).acquire(bank)
        bank.reserve(row, 64)
    window = torch.randn(3, ROWS, 2, 2 * CHUNK, 16, device=device)
    embeddings = torch.nn.functional.normalize(torch.randn(ROWS, 2, 256), dim=-1)
    starts = 128 + torch.tensor([[0, CHUNK]] * ROWS)
    bank.insert(window, window, embeddings, torch.full((ROWS, 2), CHUNK), starts, evict=False)
    newest = bank.gather(torch.full((ROWS, 1), len(bank.entries(0)) - 1), count=False)
    assert newest is not None and torch.equal(newest.keys, window[:, :, :, CHUNK:])
    for row in range(ROWS):
        bank.row(row).release(bank)
    for one, another in zip(before, gathered(bank), strict=True):
        assert torch.equal(one, another)


def test_embeddings_made_while_a_window_is_read_are_the_same(device: torch.device) -> None:
    model, works, stored = model_on(device), retrieval(), []
    for ahead in (False, True):
        bank = works.new_bank(ROWS)
        for batch in batches(documents(), device):
            memory = works.retrieve(bank, batch)
            if ahead:
                torch.set_default_dtype(torch.bfloat16)  # for all threads, as a precision of bf16-true does meanwhile
                works.embed_ahead(batch)
                works.settle()
                torch.set_default_dtype(torch.float32)
            assert isinstance(batch.get("embeddings"), Future) == (ahead and device.type == "cuda")
            with torch.no_grad():
                output = model(batch["input_ids"], memory=memory)
            works.store(bank, {"keys": output.keys, "values": output.values}, batch)
        stored.append([bank.entries(row).embeddings for row in range(ROWS)])
    assert all(torch.equal(one, other) for one, other in zip(*stored, strict=True)) and stored[0][0].any()


@pytest.mark.parametrize("storage", PLACES)
def test_a_busy_card_changes_nothing(storage: str, device: torch.device, tmp_path: Path) -> None:
    """Each kernel comes long after it was told, so that whoever does not wait for it sees something else."""
    busy = partial(torch.cuda._sleep, 20_000_000) if torch.cuda.is_available() and device.type == "cuda" else int
    bank = retrieval(storage=storage, storage_folder=str(tmp_path)).new_bank(1)
    embeddings, lengths = torch.eye(256)[None, :2], torch.full((1, 2), CHUNK)
    kept, found = [], []
    for number in range(6):
        busy()
        window = torch.randn(3, 1, 2, 2 * CHUNK, 16, generator=torch.Generator().manual_seed(number)).to(device) * 2
        bank.insert(window, window + 1, embeddings, lengths, 2 * CHUNK * number + torch.tensor([[0, CHUNK]]))
        kept.append(window.clone())
        del window  # its room may be given to the next
        busy()
        record = bank.gather(torch.tensor([[2 * number, 2 * number + 1]]), count=False)
        assert record is not None
        found.append((record.keys.clone(), record.values.clone()))
    for window, (keys, values) in zip(kept, found, strict=True):
        assert torch.equal(keys, window) and torch.equal(values, window + 1)
