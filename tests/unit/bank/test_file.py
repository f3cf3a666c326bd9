"""Bank files: read again as they were written, or refused."""

import resource
import signal
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lightning_memlong.bank.memory_bank import MemoryBank
from lightning_memlong.errors import UserError
from tests.integration.helpers import differences
from tests.unit.bank.test_memory_bank import CHUNK, good_insertion


def test_bad_bank_files_are_told(tmp_path: Path) -> None:
    bank = MemoryBank(1, 32, CHUNK)
    bank.insert(**good_insertion())
    file = bank.save(tmp_path / "bank.safetensors", backbone="a", retriever="r")
    with pytest.raises(UserError, match="backbone is 'a' there and 'b' here"):
        MemoryBank.open(file, provenance={"backbone": "b", "retriever": "r"})
    whole = file.read_bytes()
    for damaged in (whole[:-30], whole[:100], b"", whole.replace(b"ledgers", b"lodgers")):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or cut short"):
            MemoryBank.open(file)
    file.write_bytes(whole.replace(b'"version":"2"', b'"version":"9"'))
    with pytest.raises(UserError, match="version 9. Allowed: 2"):
        MemoryBank.open(file)
    file.write_bytes(whole.replace(b"memlong-bank", b"memlong-tank"))
    with pytest.raises(UserError, match="is not a bank"):
        MemoryBank.open(file)
    with pytest.raises(UserError, match="does not exist"):
        MemoryBank.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be written"):
        bank.save("/proc/nowhere/bank")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), header=st.booleans())
def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path: Path, place: float, bit: int, header: bool) -> None:
    """Wherever it is: in a tensor, in what is said of them, in the checksums themselves."""
    bank = MemoryBank(1, 32, CHUNK)
    bank.insert(**good_insertion())
    file = bank.save(tmp_path / "bank.safetensors")
    whole = bytearray(file.read_bytes())
    reach = 8 + int.from_bytes(whole[:8], "little") if header else len(whole)
    whole[int(place * reach)] ^= 1 << bit
    file.write_bytes(whole)
    try:
        found = MemoryBank.open(file).state_dict()
    except UserError as error:
        assert str(file) in str(error)
    else:
        assert not differences(found, bank.state_dict())


def test_a_full_disk_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    bank, file = MemoryBank(1, 32, CHUNK), tmp_path / "bank.safetensors"
    bank.save(file)
    before = file.read_bytes()
    keys = torch.zeros(1, 64, 8, 64)
    bank.insert(**(good_insertion() | {"keys": keys, "values": keys}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written.*free space"):
            bank.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, heard)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
