"""Writing token by token, against the same model given all tokens beforehand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts.models import Numbers
from lightning_memlong.bank import Retrieved
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.generation import LocalContext
from lightning_memlong.memlong import MemLong
from tests.gpu.conftest import error
from tests.gpu.tiny import CHUNK, WINDOW, model_on

SIMULATED = True

FORMS: list[dict[str, Any]] = [{}, {"source": "single"}, {"fusion": "gated", "bos": 2}, {"position": "zero"}]


def text(count: int, seed: int) -> list[int]:
    """Some tokens."""
    return torch.randint(3, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def words(ids: list[int]) -> str:
    """As text."""
    return " ".join(map(str, ids))


def writer(device: torch.device, storage: str = "device", **settings: Any) -> MemLong:
    """A model that can read and write."""
    model = model_on(device, **settings, attention="sdpa")
    config = MemoryConfig(
        chunk_size=CHUNK, capacity=256, top_k=2, storage=storage, retriever=RetrieverConfig("hashing")
    )
    model.use_memory(config, Numbers())
    return model


def stacked(sets: list[Retrieved]) -> Retrieved:
    """What several groups of tokens retrieved, as one record."""
    names = ("keys", "values", "mask", "scores", "entries", "positions")
    found = Retrieved(*(torch.cat([getattr(s, n) for s in sets], dim=-4 if n in names[:2] else 0) for n in names))
    found.begin = torch.cat([s.begin for s in sets])
    return found


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("form", FORMS, ids=["default", "single", "gated-bos", "zero"])
def test_each_token_is_as_if_all_were_known(
    form: dict[str, Any], storage: str, device: torch.device, measured: Callable[[str, float, float], None]
) -> None:
    model = writer(device, storage, **form)
    bank = model.read(words(text(98, 2)), window=24, progress=False)
    ids, logits, sets = text(30, 3), [], []
    context = LocalContext(model.long_context, bank, 0, WINDOW)
    context.retrieve_for_prompt(model.retrieval.retriever.encode([words(ids[:11])])[0])
    for place in range(11, 31):
        logits.append(context.logits(torch.tensor([ids[:place]], device=device))[0, 0])
        sets.append(context.retrieved)
    padded = torch.nn.functional.pad(torch.tensor([ids], device=device), (0, 2))
    memory = stacked([s for s in (sets[0], sets[0], sets[16 - 10], sets[24 - 10]) if s is not None])
    with torch.no_grad():
        known, plain = (model(padded, memory=m).logits[0, 10:30] for m in (memory, None))
    measured("writing against all tokens known: relative error of logits", error(torch.stack(logits), known), 1e-4)
    assert error(plain, known) > 1e-2, "memory matters here"


def test_a_long_answer_leaves_the_window_as_on_the_cpu(device: torch.device) -> None:
    written = []
    for where in (torch.device("cpu"), device):
        model = writer(where)
        bank = model.read(words(text(100, 2)), window=24, progress=False)
        written.append(
            model.generate(words(text(20, 3)), bank, window=WINDOW, max_new_tokens=70, min_new_tokens=70).split()
        )
        assert len(bank.entries(0)) == 13, "what was written has left the bank again"
    assert written[0] == written[1] and len(written[1]) == 70


def test_beams(device: torch.device) -> None:
    model = writer(device)
    bank = model.read(words(text(100, 2)), window=24, progress=False)
    options = {"num_beams": 3, "max_new_tokens": 20, "min_new_tokens": 20}
    assert len(model.generate(words(text(6, 3)), bank, window=WINDOW, **options).split()) == 20
