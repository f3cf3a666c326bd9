"""A tiny model with random weights, and documents read through a bank window by window."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_parts.models import Numbers
from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.memlong import MemLong
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.retrieval.retriever import HashingRetriever
from tests.conftest import tiny_llama

CHUNK, WINDOW, ROWS, WINDOWS = 8, 32, 2, 4


def model_on(device: torch.device, **settings: Any) -> MemLong:
    """The same weights on any device; gates are open."""
    backbone = tiny_llama(head_dim=16, max_position_embeddings=256)  # a smaller head FlexAttention does not take
    model = MemLong(backbone, **({"memory_layer": 1} | settings)).to(device)
    for gate in model.gates.values():
        gate.data.fill_(0.5)
    return model.eval()


def retrieval(**settings: Any) -> Retrieval:
    """Memory settings at work."""
    config = {"chunk_size": CHUNK, "capacity": 128, "top_k": 2, "retriever": RetrieverConfig("hashing")} | settings
    return Retrieval(MemoryConfig(**config), HashingRetriever(), Numbers())


def documents(seed: int = 0, windows: int = WINDOWS) -> Tensor:
    """(rows, tokens), in which things come again, so that retrieval has something to find."""
    mixer = torch.Generator().manual_seed(seed)
    return torch.randint(3, 23, (ROWS, windows * WINDOW), generator=mixer)


def batches(ids: Tensor, device: torch.device) -> list[dict[str, Any]]:
    """Windows as a DataModule gives them."""
    rows = len(ids)
    return [
        {
            "input_ids": part.to(device),
            "labels": part.to(device),
            "length": torch.full((rows,), WINDOW),
            "document_start": torch.full((rows,), number == 0),
            "document_id": torch.arange(rows),
            "offset": torch.full((rows,), number * WINDOW),
            "overlap": torch.zeros(rows, dtype=torch.long),
        }
        for number, part in enumerate(ids.split(WINDOW, dim=1))
    ]


@torch.no_grad()
def read(model: MemLong, works: Retrieval, ids: Tensor, device: torch.device) -> tuple[Tensor, MemoryBank]:
    """Logits of all tokens, read window by window through a bank; and the bank."""
    bank, logits = works.new_bank(len(ids)), []
    for batch in batches(ids, device):
        output = model(batch["input_ids"], memory=works.retrieve(bank, batch))
        works.store(bank, {"keys": output.keys, "values": output.values}, batch)
        logits.append(output.logits)
    return torch.cat(logits, dim=1), bank
