"""Files of what was learned of reading memory: taken by the same backbone, refused by others."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lightning_memlong.config import MemoryConfig
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import export, exported_settings, memory_weights, save_memory_weights, warn_of_other_memory
from tests.conftest import tiny_llama


def learned(**settings: object) -> MemLong:
    model = MemLong(tiny_llama(), memory_layer=1, **settings)  # type: ignore[arg-type]
    for number in (*model.memory_bias.values(), *model.memory_scale.values()):
        number.data.normal_(generator=torch.Generator().manual_seed(int(number.numel())))
    return model


def test_a_file_is_taken_as_it_was_written(tmp_path: Path) -> None:
    model = learned()
    file = save_memory_weights(model, tmp_path / "deep" / "memory.safetensors", {"top_k": 5, "seed": 1})
    assert file.stat().st_size < 4096
    other = MemLong(tiny_llama(), memory_layer=1, memory_weights=str(file))
    assert all(torch.equal(other.memory_bias[n], model.memory_bias[n]) for n in model.memory_bias)
    assert all(torch.equal(other.memory_scale[n], model.memory_scale[n]) for n in model.memory_scale)
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
    some = MemLong(tiny_llama(), memory_layer=1, retrieval_layers=[2], memory_weights=file)
    assert torch.equal(some.memory_bias["2"], learned().memory_bias["2"]), "fewer layers take theirs"
    with pytest.raises(UserError, match=r"layers \[1, 2, 3\].*retrieval_layers \[0, 1, 2, 3\]"):
        MemLong(tiny_llama(), memory_layer=0, memory_weights=file)


def test_so_many_layers_are_those_whose_heads_read_most(tmp_path: Path) -> None:
    model = learned()
    for layer, number in {"1": 0.5, "2": -1.0, "3": 0.2}.items():
        model.memory_bias[layer].data.fill_(number)
    file = str(save_memory_weights(model, tmp_path / "memory.safetensors"))
    chosen = MemLong(tiny_llama(), memory_layer=1, retrieval_layers=2, memory_weights=file)
    assert chosen.retrieval_layers == [1, 3] and chosen.stored_layers == [1, 3]
    with pytest.raises(UserError, match="model.retrieval_layers=4.*1 to 3 layers"):
        MemLong(tiny_llama(), memory_layer=1, retrieval_layers=4, memory_weights=file)
    for settings in ({"memory_weights": None}, {"fusion": "gated"}, {"retrieval_layers": 0, "memory_weights": file}):
        with pytest.raises(UserError, match="model.retrieval_layers=.*conf/recipes/calibrate.yaml"):
            MemLong(tiny_llama(), memory_layer=1, **{"retrieval_layers": 2} | settings)


def test_what_comes_with_the_project_is_taken_for_its_backbone_and_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_weights, "SHIPPED", tmp_path)  # what ships is for another backbone
    model = learned(position="fixed")
    save_memory_weights(model, tmp_path / "tiny.safetensors")

    def begins_with_them(backbone: PreTrainedModel, **settings: object) -> bool:
        other = MemLong(backbone, memory_layer=1, **settings)  # type: ignore[arg-type]
        return all(torch.equal(other.memory_bias[n], model.memory_bias[n]) for n in other.memory_bias)

    assert begins_with_them(tiny_llama(), position="fixed")
    assert not begins_with_them(tiny_llama(), position="sequential")
    assert not begins_with_them(tiny_llama(), position="fixed", memory_weights=None)
    assert not begins_with_them(tiny_llama(vocab_size=64), position="fixed")


def test_what_comes_with_the_project_serves_any_memory_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That learned with this layer, else with one below; layers it does not know begin with 0."""
    monkeypatch.setattr(memory_weights, "SHIPPED", tmp_path)  # what ships is for another backbone
    files = {}
    for layer in (1, 3):
        model = MemLong(tiny_llama(), memory_layer=layer, memory_weights=None)
        for number, numbers in model.memory_bias.items():
            numbers.data.fill_(10 * layer + int(number))
        files[layer] = save_memory_weights(model, tmp_path / f"{layer}.safetensors")

    def begins_with(layer: int | float) -> dict[str, float]:
        return {n: float(b.detach()[0]) for n, b in MemLong(tiny_llama(), memory_layer=layer).memory_bias.items()}

    assert begins_with(3) == begins_with(0.75) == {"3": 33.0}
    assert begins_with(1) == {"1": 11.0, "2": 12.0, "3": 13.0}
    assert begins_with(2) == {"2": 12.0, "3": 13.0}
    assert begins_with(0) == {"0": 0.0, "1": 11.0, "2": 12.0, "3": 13.0}
    with pytest.raises(UserError, match="model.memory_weights.*layers .3.*conf/recipes/calibrate.yaml"):
        MemLong(tiny_llama(), memory_layer=1, memory_weights=str(files[3]))


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
    assert all(torch.equal(back.memory_scale[n], model.memory_scale[n]) for n in model.memory_scale)
    anew = MemLong(folder, **settings, memory_weights=None)
    assert not any(n.any() for n in (*anew.memory_bias.values(), *anew.memory_scale.values()))
