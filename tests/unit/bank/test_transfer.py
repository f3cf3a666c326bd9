"""Copies beside the step: their order, their errors, and nobody looks at what has not arrived."""

import pickle
import threading
from typing import Any

import pytest
import torch

from lightning_memlong.bank.storage import ChunkStorage
from lightning_memlong.bank.transfer import WAITING, Line, Transfer
from tests.simulated_card import CARD, simulated_card

SHAPE = torch.Size((2, 2, 1, 4, 8))
SLOTS = torch.tensor([[1, 3]])
REAL = torch.ones(1, 2, dtype=torch.bool)


def chunks(device: torch.device | str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    mixer = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, 2, 4, 8, generator=mixer).to(device) for _ in range(2))
    return keys, values


def test_work_is_done_in_order_and_not_more_than_a_few_pieces_wait() -> None:
    line, done, gate = Line(), list[int](), threading.Event()
    line.give(gate.wait)
    for number in range(WAITING - 1):
        line.give(done.append, number)
    assert not done
    last = threading.Timer(0.05, gate.set)
    last.start()
    line.give(done.append, WAITING - 1)  # waits until there is room
    assert gate.is_set()
    line.settle()
    assert done == list(range(WAITING))


def test_what_went_wrong_is_raised_where_the_next_is_asked_for() -> None:
    line = Line()
    line.give(int, "seven").exception()
    with pytest.raises(ValueError, match="seven"):
        line.give(int, "7")
    line.give(int, "eight")
    with pytest.raises(ValueError, match="eight"):
        line.settle()
    assert line.give(int, "7").result() == 7, "and goes on"


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_what_is_read_is_what_was_written_before(where: str, device: str) -> None:
    def written_and_read(device: torch.device) -> list[torch.Tensor]:
        storage = ChunkStorage(SHAPE, 4, torch.float32, device, where)  # type: ignore[arg-type]
        sources, slots = torch.tensor([0, 1]), torch.tensor([1, 3])
        storage.write(*chunks(device), sources, slots)
        first = storage.read_ahead(SLOTS, REAL)
        storage.write(*chunks(device, seed=1), sources, slots)
        second = storage.read(SLOTS, REAL)
        kept = storage.take(slots)
        assert torch.equal(kept["keys"], chunks("cpu", seed=1)[0])
        return [t.cpu() for t in (*first.result().on_device(), *second)]

    expected = written_and_read(torch.device("cpu"))
    for number in (0, 1):
        keys, values = chunks("cpu", number)
        assert torch.equal(expected[2 * number], keys.flatten(2, 3)[:, None])
        assert torch.equal(expected[2 * number + 1], values.flatten(2, 3)[:, None])
    if device == "simulated":
        with simulated_card():
            found = written_and_read(CARD)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_is_done_in_the_mode_of_who_asks(mode: Any) -> None:
    """Validation allocates a bank in inference mode; nobody else may write to it."""
    with mode():
        storage = ChunkStorage(SHAPE, 4, torch.float32, "cpu", "host")
        storage.write(*chunks("cpu"), torch.tensor([0, 1]), torch.tensor([1, 3]))
        keys, _ = storage.read(SLOTS, REAL)
        assert keys.is_inference() == torch.is_inference_mode_enabled() and not keys.requires_grad
    storage.settle()


def test_what_is_on_its_way_to_the_host_is_there_only_once_it_was_waited_for() -> None:
    with simulated_card():
        sent = torch.ones(3, device=CARD)
        arriving = Transfer(CARD).to_host([sent])
        assert arriving._tensors[0].isnan().all(), "or this would prove nothing"
        assert torch.equal(arriving.on_host()[0], torch.ones(3))


def test_a_storage_that_is_handed_to_another_process_is_whole() -> None:
    storage = ChunkStorage(SHAPE, 4, torch.float32, "cpu", "host")
    storage.write(*chunks("cpu"), torch.tensor([0, 1]), torch.tensor([1, 3]))
    other = pickle.loads(pickle.dumps(storage))
    assert torch.equal(other.take(torch.tensor([1, 3]))["values"], chunks("cpu")[1])
