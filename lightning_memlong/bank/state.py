"""A bank's state as plain tensors and values, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from lightning_memlong.bank.row import Entries
from lightning_memlong.config import require

if TYPE_CHECKING:
    from lightning_memlong.bank.memory_bank import MemoryBank

SIZES = {"rows": "data.batch_size", "capacity": "memory.capacity", "chunk_size": "memory.chunk_size"}
"""What must agree, and how it is set."""


def state_of(bank: MemoryBank, keys_values: bool) -> dict[str, Any]:
    """See :meth:`MemoryBank.state_dict`."""
    storage = bank._storage
    state: dict[str, Any] = {name: getattr(bank, name) for name in (*SIZES, "insertions", "evictions")}
    state["keeps_everything"] = bank.keeps_everything
    state |= {"one_layer": bank._one_layer, "dtype": str(storage.given if storage else None)}
    state["shape"] = list(storage.keys.shape) if storage else None
    state["ledgers"] = []
    for row, ledger in enumerate(bank._ledgers):
        facts = {k: v.clone() for k, v in vars(ledger.entries).items() if k != "slots"}
        if keys_values and storage is not None:
            facts |= storage.take((bank._first + row) * bank.slots + ledger.entries.slots)
        if len(ledger.tokens):
            facts["tokens"] = ledger.tokens.clone()
        state["ledgers"].append({**facts, "serial": ledger.serial, "end": ledger.end})
    return state


def restore(bank: MemoryBank, state: Mapping[str, Any], device: torch.device | str) -> None:
    """See :meth:`MemoryBank.load_state_dict`.

    Raises:
        UserError: If the state belongs to a bank of other sizes or another element type; the bank is then as it was.
    """
    fix = "go on with that value, or start a new run"
    for name, key in SIZES.items():
        allowed = f"{state[name]}, which the saved bank was made with"
        require(state[name] == getattr(bank, name), key, getattr(bank, name), allowed, fix)
    new = copy.copy(bank)
    new._ledgers, new._storage = [], None
    for row, saved in enumerate(state["ledgers"]):
        given = getattr(torch, state["dtype"].removeprefix("torch."))
        shape = torch.Size(state["shape"])
        storage = new._allocate(shape, given, device, saved["embeddings"].shape[1], state["one_layer"])
        place = torch.arange(len(saved["born"]))
        facts = {f.name: saved[f.name] for f in fields(Entries) if f.name != "slots"}
        new._ledgers[row].restore(Entries(slots=place, **facts), saved["serial"], saved["end"])
        new._ledgers[row].tokens = saved.get("tokens", new._ledgers[row].tokens)
        if "keys" in saved:
            allowed = f"{saved['keys'].dtype}, in which the saved bank holds them"
            require(saved["keys"].dtype == storage.dtype, "memory.dtype", storage.dtype, allowed, fix)
            storage.put(row * bank.slots + place, saved)
    new.insertions, new.evictions = state["insertions"], state["evictions"]
    vars(bank).update(vars(new))
