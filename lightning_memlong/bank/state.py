"""A bank's state as plain tensors and values, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from lightning_memlong.bank.row import Entries
from lightning_memlong.bank.store import BankStore
from lightning_memlong.config import require

SIZES = {"rows": "data.batch_size", "capacity": "memory.capacity", "chunk_size": "memory.chunk_size"}
"""What must agree, and how it is set."""


def _sizes(store: BankStore, rows: int) -> dict[str, int]:
    return {"rows": rows, "capacity": store.capacity, "chunk_size": store.chunk_size}


def state_of(store: BankStore, numbers: Sequence[int], keys_values: bool) -> dict[str, Any]:
    """See :meth:`BankView.state_dict`; of the rows ``numbers``. Names are those of files and checkpoints, and stay."""
    storage = store.storage
    state: dict[str, Any] = {
        **_sizes(store, len(numbers)),
        "insertions": store.insertions,
        "evictions": store.evictions,
    }
    state["keeps_everything"] = store.keeps_everything
    state |= {"one_layer": store.one_layer, "dtype": str(storage.given if storage else None)}
    state["shape"] = list(storage.keys.shape) if storage else None
    state["ledgers"] = []
    for number in numbers if storage else ():
        row = store.rows[number]
        facts = {k: v.clone() for k, v in vars(row.entries).items() if k != "slots"}
        if keys_values and storage is not None:
            facts |= storage.take(number * store.slots + row.entries.slots)
        if len(row.tokens):
            facts["tokens"] = row.tokens.clone()
        state["ledgers"].append({**facts, "serial": row.serial, "end": row.end})
    return state


def restore(store: BankStore, state: Mapping[str, Any], device: torch.device | str) -> BankStore:
    """A store with the settings of ``store`` that holds a saved state; see :meth:`MemoryBank.load_state_dict`.

    Raises:
        UserError: If the state belongs to a bank of other sizes or another element type.
    """
    fix = "go on with that value, or start a new run"
    for name, value in _sizes(store, len(store.rows)).items():
        allowed = f"{state[name]}, which the saved bank was made with"
        require(state[name] == value, SIZES[name], value, allowed, fix)
    new = store.emptied()
    for number, saved in enumerate(state["ledgers"]):
        given = getattr(torch, state["dtype"].removeprefix("torch."))
        shape = torch.Size(state["shape"])
        storage = new.allocate(shape, given, device, saved["embeddings"].shape[1], state["one_layer"])
        place = torch.arange(len(saved["born"]))
        facts = {f.name: saved[f.name] for f in fields(Entries) if f.name != "slots"}
        entries = Entries(slots=place, **facts)
        new.rows[number].restore(entries, saved["serial"], saved["end"], saved.get("tokens"))
        if "keys" in saved:
            allowed = f"{saved['keys'].dtype}, in which the saved bank holds them"
            require(saved["keys"].dtype == storage.dtype, "memory.dtype", storage.dtype, allowed, fix)
            storage.put(number * new.slots + place, saved)
    new.insertions, new.evictions = state["insertions"], state["evictions"]
    return new
