"""Files of what was learned of reading memory: taken by the same backbone, refused by others."""

import logging
from pathlib import Path

import pytest
import torch

from lightning_memlong.config import MemoryConfig
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import export, exported_settings, save_memory_weights, warn_of_other_memory
from tests.conftest import tiny_llama


def learned(**settings: object) -> MemLong:
    model = MemLong(tiny_llama(), memory_layer=1, **settings)  # type: ignore[arg-type]
    for number in model.memory_bias.values():
        number.data.normal_(generator=torch.Generator().manual_seed(int(number.numel())))
    return model


def test_a_file_is_taken_as_it_was_written(tmp_path: Path) -> None:
    model = learned()
    file = save_memory_weights(model, tmp_path / "deep" / "memory.safetensors", {"top_k": 5, "seed": 1})
    assert file.stat().st_size < 4096
    other = MemLong(tiny_llama(), memory_layer=1, memory_weights=str(file))
    assert all(torch.equal(other.memory_bias[n], model.memory_bias[n]) for n in model.memory_bias)
    assert other.calibrated["memory"] == {"top_k": 5}


def test_other_settings_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_memory_weights(learned(), tmp_path / "memory.safetensors", {"top_k": 5, "chunk_size": 128})
    with caplog.at_level(logging.WARNING):
        other = MemLong(tiny_llama(), memory_layer=1, memory_weights=str(file), memory_distance=9)
        warn_of_other_memory(other, MemoryConfig(top_k=3))
    assert "memory_distance=255" in caplog.text and "9 here" in caplog.text
    assert "memory.top_k=5, which is 3 here" in caplog.text and "chunk_size" not in caplog.text


def test_another_backbone_or_other_layers_are_refused(tmp_path: Path) -> None:
    file = str(save_memory_weights(learned(), tmp_path / "memory.safetensors"))
    with pytest.raises(UserError, match="a file for this backbone"):
        MemLong(tiny_llama(vocab_size=64), memory_layer=1, memory_weights=file)
    with pytest.raises(UserError, match=r"layers \[1, 2, 3\].*retrieval_layers \[2\]"):
        MemLong(tiny_llama(), memory_layer=1, retrieval_layers=[2], memory_weights=file)


@pytest.mark.parametrize("content", [None, b"no tensors", b""])
def test_what_is_no_such_file_is_told(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "memory.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="model.memory_weights=.*cannot be read"):
        MemLong(tiny_llama(), memory_layer=1, memory_weights=str(file))


def test_an_exported_folder_brings_its_own(tmp_path: Path) -> None:
    model = learned()
    folder = str(export(model, tmp_path / "exported"))
    settings = {k: v for k, v in (exported_settings(folder) or {}).items() if k != "prepend_bos"}
    back = MemLong(folder, **settings)
    assert all(torch.equal(back.memory_bias[n], model.memory_bias[n]) for n in model.memory_bias)
    assert not any(n.any() for n in MemLong(folder, **settings, memory_weights=None).memory_bias.values())
