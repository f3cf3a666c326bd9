"""The same memory read in other ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong.bank import Retrieved
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import as_reading, reading, save_memory_weights
from tests.conftest import tiny_llama

TOKENS = 8


def model_of(**settings: Any) -> MemLong:
    return MemLong(tiny_llama(), memory_layer=1, **{"memory_near": 0} | settings).eval()


def windows() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 60, (1, 2 * TOKENS), generator=torch.Generator().manual_seed(0))
    return ids[:, :TOKENS], ids[:, TOKENS:]


def memory_of(model: MemLong) -> Retrieved:
    stored, mask = model(windows()[0]), torch.ones(1, TOKENS, dtype=torch.bool)
    nothing, places = torch.zeros(1, 2), torch.tensor([[0, 96]])
    return Retrieved(stored.keys, stored.values, mask, nothing, nothing, places)


@pytest.mark.parametrize("source", ["single", "per_layer"])
@torch.no_grad()
def test_it_reads_as_a_model_of_these_settings(source: str, tmp_path: Path) -> None:
    model = model_of(source=source)
    memory, window = memory_of(model), windows()[1]
    for number in (*model.memory_bias.values(), *model.memory_scale.values()):
        number.data.normal_(generator=torch.Generator().manual_seed(1))
    file = str(save_memory_weights(model_of(source=source, position="fixed"), tmp_path / "zeros.safetensors"))
    own = model(window, memory=memory).logits
    for changes in (
        {"position": "zero"},
        {"position": "sequential"},
        {"memory_distance": 30},
        {"position": "fixed", "memory_near": 4},
        {"memory_weights": file},
        {"memory_weights": None},
    ):
        other = model_of(source=source, **{"memory_weights": None, **changes})
        if "memory_weights" not in changes:
            other.memory_bias.load_state_dict(model.memory_bias.state_dict())
            if other.memory_scale:
                other.memory_scale.load_state_dict(model.memory_scale.state_dict())
        with reading(model, as_reading(model, changes, "key")):
            logits = model(window, memory=memory).logits
        torch.testing.assert_close(logits, other(window, memory=memory).logits, atol=1e-5, rtol=1e-5)
        assert (logits - own).abs().max() > 1e-4
    assert torch.equal(model(window, memory=memory).logits, own), "then its own way again"


@pytest.mark.parametrize("layers", [[1, 3], 2])
@torch.no_grad()
def test_fewer_layers_read_their_own_keys_and_values(layers: Any) -> None:
    model, window = model_of(), windows()[1]
    memory = memory_of(model)
    for layer, number in {"1": 0.2, "2": -1.0, "3": 0.1}.items():
        model.memory_bias[layer].data.fill_(number)
    fewer = model_of(retrieval_layers=[1, 3])
    fewer.memory_bias.load_state_dict({n: model.memory_bias[n].data for n in ("1", "3")})
    with reading(model, as_reading(model, {"retrieval_layers": layers}, "key")):
        logits = model(window, memory=memory).logits
    torch.testing.assert_close(logits, fewer(window, memory=memory_of(fewer)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "single"}, ["evaluation.x.model=['source']", "memory_near"]),
        ({"position": "far"}, ["model.position='far'"]),
        ({"retrieval_layers": [2]}, ["retrieval_layers [2]", "stored: [1, 3]"]),
    ],
)
def test_what_would_need_another_bank_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    model = model_of(retrieval_layers=[1, 3])
    with pytest.raises(UserError) as error:
        as_reading(model, changes, "evaluation.x.model")
    assert all(word in str(error.value) for word in words)
