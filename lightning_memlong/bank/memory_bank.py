"""The memory bank: keys, values and embeddings of chunks, one row a document stream (paper, section 2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.bank.file import load_bank, require_same, save_bank
from lightning_memlong.bank.state import restore
from lightning_memlong.bank.storage import Where
from lightning_memlong.bank.store import BankStore
from lightning_memlong.bank.view import BankView
from lightning_memlong.config import require, require_choice


class MemoryBank(BankView):
    """Preallocated, non-trainable storage with retrieval and eviction, for R independent rows.

    Args:
        rows: Document streams (batch rows).
        capacity: Size of a row [tokens]; a multiple of ``chunk_size``.
        chunk_size: Tokens of an entry.
        policy: Name or import path of an eviction policy.
        policy_args: Its keyword arguments.
        index: FAISS ``index_factory`` string.
        dtype: Element type of stored K/V; None keeps that of the first insertion; int8 has a scale for each head of
            each token, and is read as the type of the first insertion.
        half_life: Insertions after which a retrieval counts for half; None: it never fades.
        storage: Where K/V live: ``device``, ``host`` or ``disk`` (see :class:`ChunkStorage`).
        storage_folder: Folder for ``disk``; None: the system's for temporary files.

    Raises:
        UserError: For a capacity that is no multiple of the chunk size, an unknown policy or an unknown storage.
    """

    def __init__(
        self,
        rows: int = 1,
        capacity: int = 32768,
        chunk_size: int = 128,
        policy: str = "retrieval_frequency",
        policy_args: Mapping[str, Any] | None = None,
        index: str = "Flat",
        dtype: torch.dtype | None = None,
        half_life: float | None = None,
        storage: Where = "device",
        storage_folder: str | None = None,
    ) -> None:
        allowed = f"a multiple of chunk_size={chunk_size}, at least two chunks"
        require(capacity % chunk_size == 0 and capacity >= 2 * chunk_size, "capacity", capacity, allowed, "round it")
        require_choice("storage", storage, Where)
        store = BankStore(
            rows, capacity, chunk_size, policy, policy_args, index, dtype, half_life, storage, storage_folder
        )
        super().__init__(store, range(rows))
        self.provenance: dict[str, str] = {}
        """What it belongs to, such as ``weights`` and ``retriever``; goes into its file."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Element type of stored K/V; None: that of the first insertion."""
        return self._store.dtype

    @property
    def storage(self) -> Where:
        """Where K/V live."""
        return self._store.where

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` [tokens] in each row; entries stay as they are. A smaller one changes nothing.

        Raises:
            UserError: If there is not enough memory, or space on the disk; the bank is then as it was.
        """
        self._store.grow(capacity)

    def with_embeddings(self, embeddings: Sequence[Tensor]) -> BankView:
        """The same entries found by other embeddings; keys and values are shared with this bank, not copied.

        For comparing encoders: neither of the two may be inserted into afterwards.

        Args:
            embeddings: Of each row (N, E), float32, in the order of its entries.
        """
        rows = [row.with_embeddings(e) for row, e in zip(self._rows, embeddings, strict=True)]
        return BankView(self._store.with_rows(rows), self._numbers)

    # ---- states and files ---------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Take over a saved state exactly; keys and values go to ``device``, or where ``storage`` says.

        Raises:
            UserError: If the state belongs to a bank of other rows, capacity, chunk size or element type; this bank is
                then as it was.
        """
        self._store.become(restore(self._store, state, device))

    def require_provenance(self, wanted: Mapping[str, str]) -> None:
        """Check that this bank belongs to a model and a retriever, in all it says about it.

        Raises:
            UserError: If it was made with something else.
        """
        require_same("memory", self.provenance, {k: v for k, v in wanted.items() if k in self.provenance})

    def save(self, path: str | Path, **provenance: str) -> Path:
        """Write the bank to a safetensors file, whole or not at all.

        Args:
            path: The file.
            **provenance: What it belongs to, beside what :attr:`provenance` says; :meth:`open` checks it.

        Raises:
            UserError: If it cannot be written, or a conversation has its text in it.
        """
        for row in range(self.rows):
            self.row(row).require_unlocked()
        return save_bank(Path(path), self.state_dict(), {**self.provenance, **provenance})

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        provenance: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> "MemoryBank":
        """A bank that was saved by any run.

        Args:
            path: The file.
            device: Where keys and values go.
            provenance: What it must belong to, as given to :meth:`save`.
            **settings: Arguments of :class:`MemoryBank` other than its sizes, such as ``storage``. A bank that kept
                everything goes on doing so, whatever the policy; without a ``dtype`` it stays in the file's.

        Raises:
            UserError: If the file is damaged, of another version, or was made with something else.
        """
        state, there = load_bank(Path(path), provenance or {})
        if state.get("keeps_everything"):
            settings |= {"policy": "none", "policy_args": {}}
        kept = next((row["keys"].dtype for row in state["ledgers"] if "keys" in row), None)
        settings["dtype"] = settings.get("dtype") or kept
        bank = cls(state["rows"], state["capacity"], state["chunk_size"], **settings)
        bank.load_state_dict(state, device)
        bank.provenance = there
        return bank
