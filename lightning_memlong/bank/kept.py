"""A bank as a state in checkpoints, and as a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lightning_memlong.bank.file import load_bank, require_same, save_bank
from lightning_memlong.bank.state import restore, state_of

if TYPE_CHECKING:
    from lightning_memlong.bank.memory_bank import MemoryBank


class Kept:
    """How :class:`MemoryBank` outlives a process."""

    made_with: dict[str, str]
    """What it belongs to, such as ``weights`` and ``retriever``; goes into its file."""

    @property
    def _itself(self) -> "MemoryBank":
        return cast("MemoryBank", self)

    def state_dict(self, keys_values: bool = True) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors trimmed to what is filled, on the CPU.

        Args:
            keys_values: False leaves keys and values out; :meth:`rewrite` puts them back after loading.
        """
        return state_of(self._itself, keys_values)

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Take over a saved state exactly; keys and values go to ``device``, or where ``storage`` says.

        Raises:
            UserError: If the state belongs to a bank of other rows, capacity, chunk size or element type; this bank is
                then as it was.
        """
        self._itself._settle()
        restore(self._itself, state, device)

    def require_made_with(self, wanted: Mapping[str, str]) -> None:
        """Check that this bank belongs to a model and a retriever, in all it says about it.

        Raises:
            UserError: If it was made with something else.
        """
        require_same("memory", self.made_with, {k: v for k, v in wanted.items() if k in self.made_with})

    def save(self, path: str | Path, **made_with: str) -> Path:
        """Write the bank to a safetensors file, whole or not at all.

        Args:
            path: The file.
            **made_with: What it belongs to, beside what :attr:`made_with` says; :meth:`open` checks it.

        Raises:
            UserError: If it cannot be written, or a conversation has its text in it.
        """
        for row in range(self._itself.rows):
            self._itself.require_free(row)
        return save_bank(Path(path), self.state_dict(), {**self.made_with, **made_with})

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        made_with: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> "MemoryBank":
        """A bank that was saved by any run.

        Args:
            path: The file.
            device: Where keys and values go.
            made_with: What it must belong to, as given to :meth:`save`.
            **settings: Arguments of :class:`MemoryBank` other than its sizes, such as ``storage``. A bank that kept
                everything goes on doing so, whatever the policy; without a ``dtype`` it stays in the file's.

        Raises:
            UserError: If the file is damaged, of another version, or was made with something else.
        """
        state, there = load_bank(Path(path), made_with or {})
        if state.get("keeps_everything"):
            settings |= {"policy": "none", "policy_args": {}}
        kept = next((row["keys"].dtype for row in state["ledgers"] if "keys" in row), None)
        settings["dtype"] = settings.get("dtype") or kept
        bank = cast("type[MemoryBank]", cls)(state["rows"], state["capacity"], state["chunk_size"], **settings)
        bank.load_state_dict(state, device)
        bank.made_with = there
        return bank
