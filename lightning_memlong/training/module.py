"""The LightningModule: loss, optimiser and metrics. It knows no bank: without memory it is the backbone."""

from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from lightning_memlong.backbone import first_token, load_tokenizer
from lightning_memlong.config import ModelConfig, TuningConfig, require, require_choice
from lightning_memlong.distributed import gather, rank_and_world
from lightning_memlong.errors import UserError
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import CHECKPOINT_FORMAT, MemLongOutput, check_checkpoint, recognise_backbone
from lightning_memlong.text import Batch
from lightning_memlong.training.lightning_private import log_by_optimiser_steps
from lightning_memlong.training.loss_weights import LossWeights, long_context_loss, plain_loss
from lightning_memlong.training.resume import keep_recipe
from lightning_memlong.training.schedule import LinearWarmup

STATES = {"state_dict", "current_model_state"}
"""What a checkpoint holds of weights; the second where weights are averaged, and the first is the average."""
SCALE_RATE = 0.2
"""Learning rate of scales by that of biases: a score is several units large, so that a scale moves it several times."""


class MemLongModule(L.LightningModule):
    """Trains and evaluates a :class:`MemLong`.

    Args:
        backbone: What is given a memory: 'smollm2-135m' (installed with the project), a folder written by
            save_pretrained, or a hub id.
        tuning: What of the layers above the memory layer is trained.
        optimizer: Optimiser class and its arguments; it is given the trained parameters only.
        scheduler: Learning-rate schedule class and its arguments, stepped once an optimiser step.
        prepend_bos: Put the tokenizer's first token of a text (or the token of this id) before each window, and take it
            off again; null: if the tokenizer does so with a text.
        loss_weights: none: each scored token counts the same in training; long_context: by what memory is worth to it
            (LongCE, arXiv 2410.23771), min(exp(loss without memory - loss with it), 5), for a second pass.
        compare_memory_off: Also score every validation and test window without memory: same weights, same tokens.
        memory_bias_lr: Learning rate of the biases at its top, and of the scales a fifth of it; the optimiser's own is
            for weights.
        **settings: Fields of :class:`ModelConfig`: what the network is.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        tuning: TuningConfig = TuningConfig(),  # noqa: B008  (jsonargparse shows its fields as options)
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5, weight_decay=1e-4),
        scheduler: LRSchedulerCallable = LinearWarmup,
        prepend_bos: bool | int | None = None,
        loss_weights: LossWeights = "none",
        compare_memory_off: bool = True,
        memory_bias_lr: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__()
        require_choice("model.loss_weights", loss_weights, LossWeights)
        require(memory_bias_lr > 0, "model.memory_bias_lr", memory_bias_lr, "above 0", "raise it, or memory_bias false")
        config = self.settings = ModelConfig(**settings)
        """What the network is."""
        self.backbone_name = backbone
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(backbone)
        bos = first_token(self.tokenizer, prepend_bos)
        self.model = MemLong(backbone, config, tuning=tuning, bos=bos)
        # What the network is goes into the checkpoint, as plain values; the recipe belongs to a run.
        # The command line logs them, with those of memory and data beside them.
        facts = {"backbone": backbone, "prepend_bos": prepend_bos, "compare_memory_off": compare_memory_off}
        self.save_hyperparameters({**facts, **asdict(config), "tuning": asdict(tuning)}, logger=False)
        self._optimizer, self._scheduler = optimizer, scheduler
        self.compare_memory_off, self.loss_weights = compare_memory_off, loss_weights
        self.memory_bias_lr = memory_bias_lr
        self.recognised = recognise_backbone(self.model.backbone)  # before a precision plugin casts anything
        """What checkpoints say of the backbone they belong to."""
        self.validated_at = -1
        self._sharded = False
        self.nll: dict[str, MeanMetric] = {}
        # Checkpoints hold what is trained; the frozen backbone is loaded by name again.
        self.strict_loading = False

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over processes."""
        return self._sharded

    def configure_model(self) -> None:
        """Under Lightning's ModelParallelStrategy, shard each decoder layer and the rest over processes (FSDP 2)."""
        if self.device_mesh is None or self._sharded:
            return
        from torch.distributed.fsdp import fully_shard

        tensor, mesh = self.device_mesh["tensor_parallel"].size(), self.device_mesh["data_parallel"]
        allowed = "1: each process reads documents of its own; Lightning's 'auto' is the devices of a machine"
        fix = f"set data_parallel_size: {tensor * mesh.size()} and tensor_parallel_size: 1 among its init_args"
        require(tensor == 1, "trainer.strategy.tensor_parallel_size", tensor, allowed, fix)
        for layer in self.model.tuning.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self._sharded = True

    def forward(self, batch: Batch) -> MemLongOutput:
        """Read one window, with the memory found in the batch, if any."""
        return self.model(batch["input_ids"], batch["labels"], memory=batch.get("memory"))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Before any callback sees a batch, the first of a resumed run has the number it would have had."""
        if self.trainer.training:
            log_by_optimiser_steps(self.trainer)
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Loss of one window, and the keys and values to be stored."""
        rows = len(batch["input_ids"])
        if self.loss_weights == "none":
            scored = plain_loss(self.model, batch)
        else:
            scored = long_context_loss(self.model, batch, self.sharded)
        loss, means = self._over_processes(scored.loss, scored.means, batch["labels"])
        perplexity = means["loss"].exp()
        logged = {f"train/{name}": mean for name, mean in means.items()}
        self.log_dict(logged | {"train/perplexity": perplexity}, batch_size=rows)
        self.log("ppl", perplexity, prog_bar=True, logger=False, batch_size=rows)
        self._log_attention(scored.output, batch.get("memory"), rows)
        return {"loss": loss, **_to_store(scored.output, batch)}

    def _log_attention(self, output: MemLongOutput, memory: Any, rows: int) -> None:
        """How much the retrieval layers attend to memory, where the kernel tells it, and how open their gates are."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or (self.trainer.global_step + 1) % every:
            return
        known = {} if memory is None else output.attention_mass
        mass = {
            f"attention/memory_mass_layer_{k}": memory.mean_over_readers(m.mean(1)) for k, m in sorted(known.items())
        }
        gates = {f"gates/layer_{k}": gate.detach().abs().mean() for k, gate in self.model.gates.items()}
        self.log_dict(mass | gates, batch_size=rows)

    def _over_processes(
        self, loss: Tensor, means: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss whose mean gradient over processes is that of the mean over all their scored tokens; those means.

        One process may have fewer tokens than another, or none once its documents are read.
        """
        if self.trainer.world_size == 1:
            return loss, means
        scored = (labels[:, 1:] != -100).sum()
        sums = torch.stack([*(mean * scored for mean in means.values()), scored])
        *totals, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        count = count.clamp(min=1)
        every = {name: total / count for name, total in zip(means, totals, strict=True)}
        return loss * (scored * self.trainer.world_size / count), every

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Score one validation window."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Score one test window."""
        return self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> dict[str, Any]:
        output = self(batch)
        assert output.loss is not None
        scored = (batch["labels"][:, 1:] != -100).sum()
        self.nll[stage].update(output.loss, scored)
        seen = {"memory_on": output}  # observers may ask it for losses token by token
        if self.compare_memory_off and "memory" in batch:
            # Where nothing was retrieved, memory off is the same pass.
            off = output if batch["memory"] is None else self.model(batch["input_ids"], batch["labels"])
            self.nll[f"{stage}_off"].update(off.loss, scored)
            seen["memory_off"] = off
        return {**_to_store(output, batch), **seen}

    def _begin(self, stage: str) -> None:
        # Made anew each time: a metric reset in inference mode cannot be updated outside it.
        for name in (stage, f"{stage}_off"):
            self.nll[name] = MeanMetric().to(self.device)

    def on_validation_epoch_start(self) -> None:
        """Begin counting."""
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """Begin counting."""
        self._begin("test")

    def _log_perplexity(self, stage: str) -> None:
        loss = self.nll[stage].compute()
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/perplexity", loss.exp())
        if self.nll[f"{stage}_off"].update_called:
            off = self.nll[f"{stage}_off"].compute()
            self.log(f"{stage}/perplexity_memory_off", off.exp())
            self.log(f"{stage}/perplexity_ratio", (loss - off).exp())

    def on_validation_epoch_end(self) -> None:
        """Token-weighted perplexity over the validation text."""
        self.validated_at = self.trainer.global_step
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """Token-weighted perplexity over the test text."""
        self._log_perplexity("test")

    def configure_optimizers(self) -> Any:
        """Optimiser over the trained parameters, and its schedule.

        Raises:
            UserError: If nothing is trained.
        """
        if not self.model.trainable():
            raise UserError(
                "model.tuning.mode: nothing is left to train. Allowed for fit: full or lora with a layer above "
                "model.memory_layer, or gates_only. Fix: change one of them."
            )
        optimizer = self._optimizer(self._groups())
        scheduler: LRScheduler | Any = self._scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> Any:
        """Biases and scales have learning rates of their own, since they begin at zero and a unit is much; no decay."""
        trained = self.model.trainable()
        rates = {"memory_bias.": self.memory_bias_lr, "memory_scale.": SCALE_RATE * self.memory_bias_lr}
        own = {begin: [p for name, p in trained.items() if name.startswith(begin)] for begin in rates}
        rest = [p for name, p in trained.items() if not name.startswith(tuple(rates))]
        groups = [{"params": found, "lr": rates[begin], "weight_decay": 0.0} for begin, found in own.items() if found]
        return [*([{"params": rest}] if rest else []), *groups] if groups else rest

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained, note which backbone it belongs to, and the random state."""
        trained = {f"model.{name}" for name in self.model.trainable()}
        for states in STATES & {*checkpoint}:
            checkpoint[states] = {k: v for k, v in checkpoint[states].items() if k in trained}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        random = gather({"cpu": torch.get_rng_state(), "cuda": cuda})  # of each process
        checkpoint["memlong"] = {"format": CHECKPOINT_FORMAT, "backbone": self.recognised, "random": random}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs here, and take over what a resumed run goes on with."""
        fit = self.trainer.state.fn == "fit"
        check_checkpoint(self.model, checkpoint, self.recognised, complete=fit)
        if {*checkpoint} >= STATES:  # callbacks that average weights load them whole
            frozen = self.state_dict()
            checkpoint |= {states: frozen | checkpoint[states] for states in STATES}
        if fit:
            self._random = checkpoint["memlong"]["random"]
            made = self.configure_optimizers()
            fresh, schedule = made["optimizer"].param_groups, made["lr_scheduler"]["scheduler"]
            # A sharding strategy has taken the weights out, and loaded the optimiser already.
            live = [] if "state_dict" in checkpoint else self.trainer.optimizers[0].param_groups
            keep_recipe(checkpoint, fresh, live, schedule)

    def on_train_start(self) -> None:
        """Go on with a resumed run's random numbers."""
        random = self.__dict__.pop("_random", None)
        if random is not None:
            mine = random[rank_and_world()[0]]  # as many as there are processes: the data's position checks that
            torch.set_rng_state(mine["cpu"])
            if mine["cuda"]:
                torch.cuda.set_rng_state_all(mine["cuda"])


def _to_store(output: MemLongOutput, batch: Batch) -> dict[str, Tensor]:
    """What the bank stores of the window, and how it was used, if asked; nothing where there is no bank."""
    if "memory" not in batch:
        return {}
    used = {} if output.chunk_use is None else {"chunk_use": output.chunk_use}
    return {"keys": output.keys, "values": output.values, "hidden": output.memory_hidden, **used}
