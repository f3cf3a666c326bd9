"""The MemoryBankCallback: retrieval before each step, insertion and eviction after it."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.memory_checks import check_memory
from lightning_memlong.bank import MemoryBank, Retrieved
from lightning_memlong.config import MemoryConfig, require
from lightning_memlong.distributed import gather, rank_and_world
from lightning_memlong.eviction import load_policy
from lightning_memlong.query import chunk_queries, window_queries
from lightning_memlong.retriever import Retriever, load_retriever

log = logging.getLogger(__name__)

LEAK = (
    "memory.query=current LEAKS: each window retrieves with the text it is asked to predict, as the reference code "
    "does. Perplexity with memory is not a fair number; the default query, previous, is causal."
)


class MemoryBankCallback(L.Callback):
    """Keeps one bank a stage, resets its rows at document starts, and saves the training bank in checkpoints.

    Before a step it puts ``batch["memory"]``, a :class:`Retrieved` or None, into the batch; after it, it stores the
    window's chunks, which it finds in the step's output under ``keys`` and ``values``.

    Args:
        config: All settings; or give them as keywords.
        **settings: Fields of :class:`MemoryConfig`.
    """

    log_dict: Any  # provided by Lightning once the callback belongs to a trainer

    def __init__(self, config: MemoryConfig | None = None, **settings: Any) -> None:
        self.config = config or MemoryConfig(**settings)
        load_policy(self.config.policy, self.config.policy_args)  # an unknown policy is told before anything runs
        self.banks: dict[str, MemoryBank] = {}
        self._saved: Mapping[str, Any] | None = None
        self._retriever: Retriever | None = None
        self._window_embeddings: Tensor | None = None

    # ---- stages -------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Load the retriever and check the settings against the data's."""
        self.check(getattr(trainer, "datamodule", None), pl_module, stage)
        self.load_retriever()
        if self.config.query == "current":
            log.warning(LEAK)

    def check(self, data: Any, pl_module: Any, stage: str) -> None:
        """Check the settings against the data's and the model's, before a run begins.

        Raises:
            UserError: If they cannot go together.
        """
        check_memory(self.config, data, pl_module, stage)

    def load_retriever(self) -> None:
        """Load the frozen encoder, once."""
        if self._retriever is None:
            self._retriever = load_retriever(self.config.retriever)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take over the bank of a checkpoint, now that the device is known."""
        if self._saved is None:
            return
        require(
            self._saved["retriever"] == self.config.retriever.name,
            "memory.retriever.name",
            self.config.retriever.name,
            f"{self._saved['retriever']!r}, whose embeddings the saved bank holds",
            "go on with that one, or start a new run",
        )
        saved = self._saved["banks"][rank_and_world()[0]]
        bank = self._new_bank(saved["rows"])
        bank.load_state_dict(saved, pl_module.device)
        if not self._saved["keys_values"]:
            with trainer.precision_plugin.forward_context():
                self._read_again(bank, getattr(trainer, "datamodule", None), pl_module)
        self.banks["train"], self._saved = bank, None

    @torch.no_grad()
    def _read_again(self, bank: MemoryBank, data: Any, pl_module: Any) -> None:
        """Compute the keys and values that a checkpoint left out, window by window as they were computed first."""
        windows = data.begun()
        for row, read in enumerate(windows):
            for number, tokens in enumerate(read):
                ids = torch.from_numpy(tokens.astype("int64"))[None].to(pl_module.device)
                output = pl_module.model(ids)
                fresh = 0 if number == 0 else data.window - data.stride
                start = number * data.stride
                positions = torch.arange(start + fresh, start + data.window, self.config.chunk_size)
                bank.rewrite(row, output.keys[0, :, fresh:], output.values[0, :, fresh:], positions)
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
        """Reset rows that begin a document, then search and gather for the window (paper, section 2)."""
        bank = self.banks.get(stage)
        if bank is None:
            bank = self.banks[stage] = self._new_bank(len(batch["input_ids"]))
        bank.reset(batch["document_start"].cpu())
        # Streams of one's own need not say these where windows are disjoint and in order.
        batch.setdefault("offset", bank.ends())
        batch.setdefault("fresh", torch.zeros_like(batch["offset"]))
        self._window_embeddings = self._embedded_beforehand(batch, pl_module)
        batch["memory"] = self._retrieved(bank, batch)

    def _embedded_beforehand(self, batch: dict[str, Any], pl_module: Any) -> Tensor | None:
        """Embeddings of the window's chunks where queries need them; the rest are made when chunks are stored."""
        if self.config.query == "current":
            return self._embed(batch, pl_module)
        if self.config.granularity == "chunk" and self.config.selection == "similarity":
            return self._embed(batch, pl_module, self._new_lengths(batch) > 0)
        return None

    def _retrieved(self, bank: MemoryBank, batch: dict[str, Any]) -> Retrieved | None:
        if bank.insertions == 0:
            return None
        before, top_k = batch["offset"].cpu(), self.config.top_k
        chunks = batch["input_ids"].shape[1] // self.config.chunk_size if self.config.granularity == "chunk" else 1
        if self.config.selection == "recent":
            return bank.gather(bank.recent(top_k, before)[:, None].expand(-1, chunks, -1))
        if self.config.selection == "random":
            places = list(zip(batch["document_id"].tolist(), before.tolist(), strict=True))
            drawn = [
                bank.random(top_k, [_seed(self.config.seed, *p, c) for p in places], before) for c in range(chunks)
            ]
            return bank.gather(torch.stack(drawn, dim=1))
        scores, entries = bank.search(self._queries(bank, batch, before), top_k, before)
        return bank.gather(entries, scores)

    def _queries(self, bank: MemoryBank, batch: dict[str, Any], before: Tensor) -> Tensor:
        """(R, G, E): one query a row, or one a chunk."""
        own, by_chunk = self._window_embeddings, self.config.granularity == "chunk"
        if self.config.query == "current":
            assert own is not None
            return own if by_chunk else F.normalize(own.mean(dim=1, keepdim=True), dim=2)
        if by_chunk:
            assert own is not None
            return chunk_queries(bank, own, before, batch["fresh"].cpu(), self.config.query_chunks)
        return window_queries(bank, before, self.config.query_chunks)[:, None]

    def store(self, stage: str, outputs: Mapping[str, Any], batch: dict[str, Any], pl_module: Any) -> None:
        """Insert the chunks of the window that are new, with their embeddings; the bank evicts when full."""
        lengths = self._new_lengths(batch)
        embeddings = self._window_embeddings
        if embeddings is None:
            embeddings = self._embed(batch, pl_module, lengths > 0)
        positions = batch["offset"].cpu()[:, None] + self._chunks(batch)[0]
        self.banks[stage].insert(outputs["keys"], outputs["values"], embeddings, lengths, positions)

    def _new_lengths(self, batch: dict[str, Any]) -> Tensor:
        """Real tokens (B, n) of the window's chunks; 0 for those that were stored with an earlier window."""
        starts, lengths = self._chunks(batch)
        lengths[starts.expand_as(lengths) < batch["fresh"].cpu()[:, None]] = 0
        return lengths

    def _chunks(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Where the window's chunks begin (n,), and how many real tokens each has (B, n)."""
        starts = torch.arange(0, batch["input_ids"].shape[1], self.config.chunk_size)
        return starts, (batch["length"].cpu()[:, None] - starts).clamp(0, self.config.chunk_size)

    def _embed(self, batch: dict[str, Any], pl_module: Any, wanted: Tensor | None = None) -> Tensor:
        """Embeddings (B, n, E) of the window's chunks; zeros where not wanted."""
        assert self._retriever is not None
        size = self.config.chunk_size
        rows, tokens = batch["input_ids"].shape
        chunks = batch["input_ids"].cpu().view(rows * tokens // size, size)
        lengths = self._chunks(batch)[1].flatten()
        which = (lengths > 0) if wanted is None else wanted.flatten()
        embeddings = torch.zeros(len(chunks), self._retriever.size)
        if bool(which.any()):
            texts = pl_module.tokenizer.batch_decode(
                [chunks[i, : lengths[i]] for i in which.nonzero().flatten()], clean_up_tokenization_spaces=False
            )
            self._retriever.to(pl_module.device)
            embeddings[which] = self._retriever.encode(texts)
        return embeddings.view(rows, tokens // size, -1)

    def _new_bank(self, rows: int) -> MemoryBank:
        c = self.config
        dtype = None if c.dtype == "auto" else getattr(torch, c.dtype)
        return MemoryBank(
            rows, c.capacity, c.chunk_size, c.policy, c.policy_args, c.index, dtype,
            c.half_life, c.storage, c.storage_folder,
        )  # fmt: skip

    # ---- logging and checkpoints --------------------------------------------------------------------------

    def _log(self, trainer: L.Trainer, stage: str, memory: Retrieved | None, batch: dict[str, Any]) -> None:
        """Scalars ``memory/...`` (training) and ``memory_val/...``, ``memory_test/...``."""
        group = "memory" if stage == "train" else f"memory_{stage}"
        stats = self.banks[stage].stats()
        values = {k: stats[k] for k in ("fill", "insertions", "evictions", "never_retrieved")}
        if memory is not None:
            real = memory.positions >= 0
            offset = batch["offset"].cpu().repeat_interleave(len(real) // len(batch["offset"]))
            distance = (offset[:, None] - memory.positions)[real]
            values["distance_tokens"] = float(distance.float().mean())
            if self.config.selection == "similarity":
                values["score"] = float(memory.scores[real].mean())
        self.log_dict({f"{group}/{k}": float(v) for k, v in values.items()}, batch_size=len(batch["input_ids"]))

    def state_dict(self) -> dict[str, Any]:
        """The training bank of every process, if there is one."""
        if "train" not in self.banks:
            return {}
        kept = self.config.save_keys_values
        banks = gather(self.banks["train"].state_dict(kept))
        return {"banks": banks, "retriever": self.config.retriever.name, "keys_values": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved bank until training starts; evaluation starts empty and never looks at it."""
        self._saved = state_dict if "banks" in state_dict else None


def _seed(*parts: int) -> int:
    """One seed for a place in the data, so that a resumed run draws what an unbroken one would."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed
