"""A checkpoint is there whole or not at all."""

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_memlong.training.checkpoint_io import WholeCheckpointIO, write_whole_checkpoints


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of at most 10,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, small_disk: None) -> None:
    file, io = tmp_path / "deep" / "last.ckpt", WholeCheckpointIO()
    io.save_checkpoint({"step": 1}, file)
    with pytest.raises(OSError, match="large"):
        io.save_checkpoint({"step": 2, "weights": torch.zeros(9_000)}, file)
    assert torch.load(file, weights_only=True) == {"step": 1} and [*file.parent.iterdir()] == [file]


def test_a_part_that_was_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.part").write_bytes(b"half" * 1000)
    WholeCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert [f.name for f in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_address_is_left_to_fsspec() -> None:
    WholeCheckpointIO().save_checkpoint({"step": 1}, "memory://checkpoints/last.ckpt")  # type: ignore[arg-type]
    assert WholeCheckpointIO().load_checkpoint("memory://checkpoints/last.ckpt", weights_only=True) == {"step": 1}


def test_what_somebody_chose_is_kept() -> None:
    plain = L.Trainer(logger=False, accelerator="cpu")
    chosen = L.Trainer(logger=False, accelerator="cpu", plugins=[AsyncCheckpointIO()])
    for trainer in (plain, chosen):
        write_whole_checkpoints(trainer)
    assert isinstance(plain.strategy.checkpoint_io, WholeCheckpointIO)
    assert isinstance(chosen.strategy.checkpoint_io, AsyncCheckpointIO)
