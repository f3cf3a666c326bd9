"""The MemoryBankCallback: retrieval before each step, insertion and eviction after it."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch

from lightning_memlong.bank import MemoryBank, Retrieved, load_policy
from lightning_memlong.config import MemoryConfig, require
from lightning_memlong.distributed import gather, rank_and_world
from lightning_memlong.model import warn_of_other_memory
from lightning_memlong.retrieval import Retrieval, Retriever, load_retriever, load_selector
from lightning_memlong.text import ON_DEVICE

from .memory_checks import check_batch, check_memory

log = logging.getLogger(__name__)

LEAK = (
    "memory.query=current LEAKS: each window retrieves with the text it is asked to predict, as the reference code "
    "does. Perplexity with memory is not a fair number; the default query, previous, is causal."
)


class MemoryBankCallback(L.Callback):
    """Keeps one bank a stage, resets its rows at document starts, and saves the training bank in checkpoints.

    Before a step it puts ``batch["memory"]``, a :class:`Retrieved` or None, into the batch; after it, it stores the
    window's chunks, which it finds in the step's output under ``keys`` and ``values``. For ``memory.use`` attention it
    needs ``chunk_use`` there as well.

    Args:
        config: All settings; or give them as keywords.
        **settings: Fields of :class:`MemoryConfig`.
    """

    log_dict: Any  # provided by Lightning once the callback belongs to a trainer

    def __init__(self, config: MemoryConfig | None = None, **settings: Any) -> None:
        self.config = config or MemoryConfig(**settings)
        # What is unknown is told before anything runs.
        load_policy(self.config.policy, self.config.policy_args)
        load_selector(self.config.selection)
        self.banks: dict[str, MemoryBank] = {}
        self._saved: Mapping[str, Any] | None = None
        self._retriever: Retriever | None = None
        self._retrieval: Retrieval | None = None
        self._profile: Any = nullcontext

    # ---- stages -------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Load the retriever and check the settings against the data's."""
        self._profile = trainer.profiler.profile  # type: ignore[attr-defined]
        self.check(getattr(trainer, "datamodule", None), pl_module, stage)
        self.load_retriever(pl_module)
        warn_of_other_memory(pl_module.model, self.config)
        if self.config.query == "current":
            log.warning(LEAK)

    def check(self, data: Any, pl_module: Any, stage: str) -> None:
        """Check the settings against the data's and the model's, before a run begins.

        Raises:
            UserError: If they cannot go together.
        """
        check_memory(self.config, data, pl_module, stage)

    def load_retriever(self, pl_module: Any) -> None:
        """Load the frozen encoder, once."""
        if self._retriever is None:
            self._retriever = load_retriever(self.config.retriever, pl_module.model.config.hidden_size)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take over the bank of a checkpoint, now that the device is known."""
        if self._saved is None:
            return
        require(
            self._saved["retriever"] == self.config.retriever.identity,
            "memory.retriever",
            self.config.retriever.identity,
            f"{self._saved['retriever']!r}, whose embeddings the saved bank holds",
            "go on with that one, or start a new run",
        )
        saved = self._saved["banks"][rank_and_world()[0]]
        bank = self.retrieval(pl_module).new_bank(saved["rows"])
        bank.load_state_dict(saved, pl_module.device)
        if not self._saved["keys_values"]:
            with trainer.precision_plugin.forward_context():
                self._read_again(bank, getattr(trainer, "datamodule", None), pl_module)
        self.banks["train"], self._saved = bank, None

    @torch.no_grad()
    def _read_again(self, bank: MemoryBank, data: Any, pl_module: Any) -> None:
        """Compute the keys and values that a checkpoint left out, window by window as they were computed first."""
        windows = data.replay_windows()
        for row, read in enumerate(windows):
            for number, tokens in enumerate(read):
                ids = torch.from_numpy(tokens.astype("int64"))[None].to(pl_module.device)
                output = pl_module.model(ids)
                overlap = 0 if number == 0 else data.window - data.stride
                start = number * data.stride
                positions = torch.arange(start + overlap, start + data.window, self.config.chunk_size)
                bank.overwrite(row, output.keys[0, :, overlap:], output.values[0, :, overlap:], positions)
        log.info("Read %d windows again for the memory bank", sum(map(len, windows)))

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Validate with an empty bank of its own; the training bank is left alone."""
        self.banks.pop("val", None)
        if trainer.state.fn != "fit":
            self._saved = None  # an evaluation has no use for the training bank of its checkpoint

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Give the validation bank's memory back."""
        if trainer.state.fn == "fit":
            self.banks.pop("val", None)

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Test with an empty bank."""
        self.banks.pop("test", None)
        self._saved = None

    # ---- steps --------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Retrieve for a training window."""
        self.retrieve("train", batch, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Store a training window."""
        self.store("train", outputs, batch, pl_module)
        self._log(trainer, "train", batch["memory"], batch)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Retrieve for a validation window."""
        self.retrieve("val", batch, pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store a validation window."""
        self.store("val", outputs, batch, pl_module)
        self._log(trainer, "val", batch["memory"], batch)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Retrieve for a test window."""
        self.retrieve("test", batch, pl_module)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store a test window."""
        self.store("test", outputs, batch, pl_module)
        self._log(trainer, "test", batch["memory"], batch)

    # ---- the work -----------------------------------------------------------------------------------------

    def retrieve(self, stage: str, batch: dict[str, Any], pl_module: Any) -> None:
        """Reset rows that begin a document, then search and gather for the window (paper, section 2).

        Raises:
            UserError: For a batch of another shape than a bank's.
        """
        retrieval = self.retrieval(pl_module)
        bank = self.banks.get(stage)
        if bank is None:
            bank = self.banks[stage] = retrieval.new_bank(len(batch["input_ids"]))
        check_batch(batch, bank.rows, self.config.chunk_size)
        _keep_facts_here(batch)
        bank.reset(batch["document_start"])
        # Streams of one's own need not say these where windows are disjoint and in order.
        batch.setdefault("offset", bank.ends())
        batch.setdefault("overlap", torch.zeros_like(batch["offset"]))
        distractors = self.config.distractors if stage == "train" else 0
        batch["memory"] = retrieval.retrieve(bank, batch, distractors=distractors)
        retrieval.embed_ahead(batch)

    def store(self, stage: str, outputs: Mapping[str, Any], batch: dict[str, Any], pl_module: Any) -> None:
        """Insert the chunks of the window that are new, with their embeddings; the bank evicts when full.

        Before that, what the window attended to is counted, with ``memory.use`` attention.
        """
        retrieval, bank = self.retrieval(pl_module), self.banks[stage]
        retrieval.count_use(bank, batch.get("memory"), outputs.get("chunk_use"))
        retrieval.store(bank, outputs, batch)

    def retrieval(self, pl_module: Any) -> Retrieval:
        """The settings at work; the encoder is loaded once, and its texts come from the module's tokenizer."""
        if self._retrieval is None or self._retrieval.tokenizer is not pl_module.tokenizer:
            self.load_retriever(pl_module)
            assert self._retriever is not None
            self._retrieval = Retrieval(self.config, self._retriever, pl_module.tokenizer, self._profile)
        return self._retrieval

    # ---- logging and checkpoints --------------------------------------------------------------------------

    def _log(self, trainer: L.Trainer, stage: str, memory: Retrieved | None, batch: dict[str, Any]) -> None:
        """Scalars ``memory/...`` (training) and ``memory_val/...``, ``memory_test/...``."""
        group = "memory" if stage == "train" else f"memory_{stage}"
        stats = self.banks[stage].stats()
        values = {k: stats[k] for k in ("fill", "insertions", "evictions", "never_retrieved")}
        # Distractors have no place in the document; a window may have found nothing else.
        if memory is not None and bool((real := memory.positions >= 0).any()):
            offset = batch["offset"].repeat_interleave(len(real) // len(batch["offset"]))
            distance = (offset[:, None] - memory.positions)[real]
            values["distance_tokens"] = float(distance.float().mean())
            if not bool(memory.scores[real].isnan().any()):  # the controls have none
                values["score"] = float(memory.scores[real].mean())
        self.log_dict({f"{group}/{k}": float(v) for k, v in values.items()}, batch_size=len(batch["input_ids"]))

    def state_dict(self) -> dict[str, Any]:
        """The training bank of every process, if there is one."""
        if "train" not in self.banks:
            return {}
        kept = self.config.save_keys_values
        banks = gather(self.banks["train"].state_dict(kept))
        return {"banks": banks, "retriever": self.config.retriever.identity, "keys_values": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved bank until training starts; evaluation starts empty and never looks at it."""
        self._saved = state_dict if "banks" in state_dict else None


def _keep_facts_here(batch: dict[str, Any]) -> None:
    """Bring facts of a window to the host, where they are used, if a DataModule of one's own has moved them."""
    for name, value in batch.items():
        if name not in ON_DEVICE and isinstance(value, torch.Tensor):
            batch[name] = value.cpu()


def memory_callback(trainer: L.Trainer) -> MemoryBankCallback | None:
    """The memory of a trainer, unless it is switched off."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, MemoryBankCallback)), None)
