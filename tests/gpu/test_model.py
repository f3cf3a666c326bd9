"""The whole model with its bank: causality, checkpointing, and what it is without memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import tiny_llama
from tests.gpu.conftest import error
from tests.gpu.tiny import WINDOW, batches, documents, model_on, read, retrieval

SIMULATED = True

Measured = Callable[[str, float, float], None]
FORMS: list[dict[str, Any]] = [
    {},
    {"source": "single", "retrieval_layers": [1, 3], "fusion": "gated", "position": "zero"},
]
IDS = ["per_layer-joint", "single-gated"]


@pytest.mark.parametrize("granularity", ["window", "chunk"])
@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_no_token_sees_a_later_one(form: dict[str, Any], granularity: str, device: torch.device) -> None:
    # One masked call, whatever the groups: nothing is compiled, and test_flex.py checks that kernel.
    model, works = model_on(device, **form, attention="sdpa"), retrieval(granularity=granularity)
    ids = documents()
    plain, _ = read(model, works, ids, device)
    for place in (2 * WINDOW - 1, 2 * WINDOW, 2 * WINDOW + 9):
        changed = ids.clone()
        changed[:, place:] = documents(1)[:, place:]
        other, _ = read(model, works, changed, device)
        torch.testing.assert_close(other[:, :place], plain[:, :place], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(other[:, place:], plain[:, place:], atol=1e-2), "the change is seen afterwards"


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_checkpointing_changes_nothing(form: dict[str, Any], device: torch.device, measured: Measured) -> None:
    works, results = retrieval(), []
    _, bank = read(model_on(device, **form), works, documents(windows=3), device)
    batch = batches(documents(), device)[3]
    memory = works.retrieve(bank, batch, count=False)
    assert memory is not None and memory.keys.device.type == device.type
    for checkpointing in (False, True):
        model = model_on(device, **form, gradient_checkpointing=checkpointing).train()
        output = model(batch["input_ids"], batch["labels"], memory=memory)
        assert output.loss is not None
        output.loss.backward()
        results.append((output.loss, {name: p.grad for name, p in model.trainable().items()}))
    (loss, grads), (again, others) = results
    measured("checkpointing: relative error of the loss", error(again, loss), 1e-6)
    worst = max(error(others[name], grad) for name, grad in grads.items())
    measured("checkpointing: relative error of gradients", worst, 1e-4)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_without_memory_it_is_the_backbone(form: dict[str, Any], device: torch.device, measured: Measured) -> None:
    ids = documents()[:, :WINDOW].to(device)
    model, works = model_on(device, **form), retrieval()
    with torch.no_grad():
        expected = tiny_llama(head_dim=16, max_position_embeddings=256).to(device)(ids).logits
        memory = works.retrieve(works.new_bank(2), batches(documents(), device)[0])
        assert memory is None
        measured(
            "empty bank against the backbone: relative error", error(model(ids, memory=memory).logits, expected), 1e-5
        )


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_it_computes_what_the_cpu_computes(form: dict[str, Any], device: torch.device, measured: Measured) -> None:
    expected, _ = read(model_on(torch.device("cpu"), **form), retrieval(), documents(), torch.device("cpu"))
    found, _ = read(model_on(device, **form), retrieval(), documents(), device)
    measured("logits read through a bank, against the CPU: relative error", error(found, expected), 1e-4)


def test_bfloat16_is_near(device: torch.device, measured: Measured) -> None:
    exact, _ = read(model_on(device), retrieval(), documents(), device)
    found, _ = read(model_on(device).to(torch.bfloat16), retrieval(), documents(), device)
    measured("logits in bfloat16 against float32: relative error", error(found, exact), 5e-2)
