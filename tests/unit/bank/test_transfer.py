"""Copies beside the step: their order, their errors, and nobody looks at what has not arrived."""

import copy
import os
import pickle
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lightning_memlong.bank import MemoryBank, Retrieved
from lightning_memlong.bank.storage import ChunkStorage
from lightning_memlong.bank.transfer import WAITING, Line, Transfer
from tests import simulated_card as simulated_card_module
from tests.simulated_card import CARD, simulated_card

SHAPE = torch.Size((2, 2, 1, 4, 8))
SLOTS = torch.tensor([[1, 3]])
PLACES = torch.tensor([0, 1]), torch.tensor([1, 3])
"""Sources and slots."""
REAL = torch.ones(1, 2, dtype=torch.bool)


def chunks(device: torch.device | str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    mixer = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, 2, 4, 8, generator=mixer).to(device) for _ in range(2))
    return keys, values


def test_work_is_done_in_order_and_not_more_than_a_few_pieces_wait() -> None:
    line, done, gate = Line(), list[int](), threading.Event()
    line.ask(gate.wait)
    for number in range(WAITING - 1):
        line.leave(done.append, number)
    assert not done
    threading.Timer(0.05, gate.set).start()
    line.leave(done.append, WAITING - 1)  # waits until there is room
    assert gate.is_set()
    line.settle()
    assert done == list(range(WAITING))


def test_what_goes_wrong_with_what_was_asked_for_comes_with_it_alone() -> None:
    line = Line()
    with pytest.raises(ValueError, match="seven"):
        line.ask(int, "seven").result()
    line.settle()
    assert line.ask(int, "7").result() == 7


def test_after_what_goes_wrong_with_what_was_left_nothing_is_done() -> None:
    line, done, gate = Line(), list[int](), threading.Event()
    line.ask(gate.wait)
    line.leave(int, "seven")
    line.leave(done.append, 1)
    asked = line.ask(done.append, 2)
    gate.set()
    for again in (asked.result, line.settle, line.check, lambda: line.leave(done.append, 3)):
        with pytest.raises(ValueError, match="seven"):
            again()
    assert not done


def test_another_process_has_a_line_of_its_own() -> None:
    line = Line()
    line.ask(int, "7")
    line._process = -1  # as after a fork, where the thread is not
    assert line.ask(int, "8").result() == 8
    assert copy.deepcopy(line).ask(int, "9").result() == 9


def written_and_read(device: torch.device, where: Any) -> list[torch.Tensor]:
    """Chunks are written, read, and others written in their places meanwhile; what was read before and after."""
    storage = ChunkStorage(SHAPE, 4, torch.float32, device, where)
    for number in (0, 1):
        storage.write(storage.stage(*chunks(device, number)), *PLACES)
        if number == 0:
            first = storage.read_ahead(SLOTS, REAL)
    second = storage.read(SLOTS, REAL)
    assert torch.equal(storage.take(PLACES[1])["keys"], chunks("cpu", 1)[0])
    return [t.cpu() for t in (*first.result().on_device(), *second)]


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("place", ["cpu", "simulated"])
def test_what_is_read_is_what_was_written_before(where: str, place: str) -> None:
    with simulated_card() if place == "simulated" else nullcontext():
        found = written_and_read(CARD if place == "simulated" else torch.device("cpu"), where)
    for number in (0, 1):
        for tensor, expected in zip(found[2 * number :], chunks("cpu", number), strict=False):
            assert torch.equal(tensor, expected.flatten(2, 3)[:, None])


@pytest.mark.parametrize("missing", ["wait_stream", "wait_event", "synchronize"])
def test_each_wait_is_needed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the simulated card tells where one is not there."""
    owner = simulated_card_module._Event if missing == "synchronize" else simulated_card_module._Stream
    monkeypatch.setattr(owner, missing, lambda *_: None)
    with simulated_card(), pytest.raises((RuntimeError, AssertionError)):
        written_and_read(CARD, "host")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_is_done_in_the_mode_of_who_asks(mode: Any) -> None:
    """Validation allocates a bank in inference mode; nobody else may write to it."""
    with mode():
        storage = ChunkStorage(SHAPE, 4, torch.float32, "cpu", "host")
        storage.write(storage.stage(*chunks("cpu")), *PLACES)
        keys, _ = storage.read(SLOTS, REAL)
        assert keys.is_inference() == torch.is_inference_mode_enabled() and not keys.requires_grad
    storage.settle()


def test_what_is_on_its_way_to_the_host_is_there_only_once_it_was_waited_for() -> None:
    with simulated_card():
        arriving = Transfer(CARD, "bank").to_host([torch.ones(3, device=CARD)])
        assert arriving._tensors[0].isnan().all(), "or this would prove nothing"
        assert torch.equal(arriving.on_host()[0], torch.ones(3))


def test_tensors_of_another_device_are_brought_to_the_banks() -> None:
    with simulated_card():
        storage = ChunkStorage(SHAPE, 4, torch.float32, CARD, "host")
        storage.write(storage.stage(*chunks("cpu")), *PLACES)
        assert torch.equal(storage.take(PLACES[1])["values"], chunks("cpu")[1])


def test_a_failed_write_stops_the_bank_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_card():
        bank = MemoryBank(1, 32, 4, storage="host")
        window = torch.randn(2, 1, 2, 8, 8, device=CARD)
        facts = [torch.eye(4)[None, :2], torch.full((1, 2), 4), torch.tensor([[0, 4]])]
        bank.insert(window, window, *facts)
        monkeypatch.setattr(ChunkStorage, "_write", lambda *_: os.stat("/nowhere"))
        bank.insert(window, window, *facts)
        with pytest.raises(FileNotFoundError):
            bank.state_dict()
        entries = len(bank.entries(0))
        with pytest.raises(FileNotFoundError):
            bank.insert(window, window, *facts)
        assert len(bank.entries(0)) == entries == 4


def test_a_storage_that_is_handed_to_another_process_is_whole() -> None:
    storage = ChunkStorage(SHAPE, 4, torch.float32, "cpu", "host")
    storage.write(storage.stage(*chunks("cpu")), *PLACES)
    other = pickle.loads(pickle.dumps(storage))
    assert torch.equal(other.take(PLACES[1])["values"], chunks("cpu")[1])


def test_a_record_that_is_still_read_can_be_copied() -> None:
    bank = MemoryBank(1, 32, 4, storage="disk")
    window = torch.randn(2, 1, 2, 8, 8)
    bank.insert(window, window, torch.eye(4)[None, :2], torch.full((1, 2), 4), torch.tensor([[0, 4]]))
    found = bank.gather(torch.tensor([[0, 1]]))
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(other) is Retrieved and torch.equal(other.keys, window) and other.full
