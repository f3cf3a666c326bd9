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

from lightning_memlong.backbone.layers import LayerIndex
from lightning_memlong.backbone.loading import first_token, load_tokenizer
from lightning_memlong.config import DEFAULT_MEMORY_LAYER, TuningConfig, require
from lightning_memlong.distributed import gather, rank_and_world
from lightning_memlong.errors import UserError
from lightning_memlong.model.model import MemLong
from lightning_memlong.model.output import MemLongOutput
from lightning_memlong.training.resume import keep_recipe
from lightning_memlong.training.schedule import LinearWarmup

Batch = dict[str, Any]
CHECKPOINT_FORMAT = 2


class MemLongModule(L.LightningModule):
    """Trains and evaluates a :class:`MemLong`.

    Args:
        backbone: What is given a memory: 'smollm2-135m' (installed with the project), a folder written by
            save_pretrained, or a hub id.
        memory_layer: Layer whose keys and values are stored [index from 0, or fraction of the depth: 0.5]; it and all
            below are frozen. Paper, section 3: 13 of 26.
        retrieval_layers: Layers that attend to memory [indices from 0, or fractions]; null: memory_layer and all above
            it, without sliding-window layers where there are others. Paper, section 3: 13, 17, 21, 25.
        source: 'per_layer': each retrieval layer stores and reads its own keys and values; 'single': those of the
            memory layer are read by all (the paper).
        fusion: 'joint': one softmax over memory and window; 'gated': two, with a zero-initialised gate a head
            (paper, section 2).
        position: 'sequential': retrieved tokens have running positions; 'zero': all at position 0 (the paper).
        tuning: What of the layers above the memory layer is trained.
        optimizer: Optimiser class and its arguments; it is given the trained parameters only.
        scheduler: Learning-rate schedule class and its arguments, stepped once an optimiser step.
        gradient_checkpointing: Recompute layers in the backward pass instead of keeping their activations.
        attention: Attention kernels. auto: PyTorch's scaled_dot_product_attention, in two parts on the CPU, and
            FlexAttention on CUDA where scores are soft-capped or retrieval is by chunk; sdpa: one masked call; flex:
            FlexAttention (CUDA).
        prepend_bos: Put the tokenizer's first token of a text (or the token of this id) before each window, and take it
            off again; null: if the tokenizer does so with a text.
        compare_memory_off: Also score every validation and test window without memory: same weights, same tokens.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        memory_layer: LayerIndex = DEFAULT_MEMORY_LAYER,
        retrieval_layers: list[LayerIndex] | None = None,
        source: str = "per_layer",
        fusion: str = "joint",
        position: str = "sequential",
        tuning: TuningConfig = TuningConfig(),  # noqa: B008  (jsonargparse shows its fields as options)
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5, weight_decay=1e-4),
        scheduler: LRSchedulerCallable = LinearWarmup,
        gradient_checkpointing: bool = False,
        attention: str = "auto",
        prepend_bos: bool | int | None = None,
        compare_memory_off: bool = True,
    ) -> None:
        super().__init__()
        # What the network is goes into the checkpoint, as plain values; the recipe belongs to a run.
        # The command line logs them, with those of memory and data beside them.
        self.save_hyperparameters(ignore=["tuning", "optimizer", "scheduler"], logger=False)
        self.save_hyperparameters({"tuning": asdict(tuning)}, logger=False)
        self.backbone_name = backbone
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(backbone)
        self.model = MemLong(
            backbone,
            memory_layer,
            retrieval_layers,
            source,
            fusion,
            position,
            tuning,
            gradient_checkpointing,
            attention,
            first_token(self.tokenizer, prepend_bos),
        )
        self._optimizer, self._scheduler = optimizer, scheduler
        self.compare_memory_off = compare_memory_off
        self._fingerprint = self._recognise()  # before a precision plugin casts anything
        self.validated_at = -1
        self._sharded = False
        self.nll: dict[str, MeanMetric] = {}
        # Checkpoints hold what is trained; the frozen backbone is loaded by name again.
        self.strict_loading = False

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

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Loss of one window, and the keys and values to be stored."""
        output = self(batch)
        assert output.loss is not None
        rows = len(batch["input_ids"])
        loss, mean = self._over_processes(output.loss, batch["labels"])
        perplexity = mean.exp()
        self.log_dict({"train/loss": mean, "train/perplexity": perplexity}, batch_size=rows)
        self.log("ppl", perplexity, prog_bar=True, logger=False, batch_size=rows)
        self._log_attention(output, rows)
        return {"loss": loss, **_to_store(output, batch)}

    def _log_attention(self, output: MemLongOutput, rows: int) -> None:
        """How much the retrieval layers attend to memory, where the kernel tells it, and how open their gates are."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or (self.trainer.global_step + 1) % every:
            return
        mass = {f"attention/memory_mass_layer_{k}": m.mean() for k, m in sorted(output.attention_mass.items())}
        gates = {f"gates/layer_{k}": gate.detach().abs().mean() for k, gate in self.model.gates.items()}
        self.log_dict(mass | gates, batch_size=rows)

    def _over_processes(self, loss: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss whose mean gradient over processes is that of the mean over all their scored tokens; that mean.

        One process may have fewer tokens than another, or none once its documents are read.
        """
        if self.trainer.world_size == 1:
            return loss, loss.detach()
        scored = (labels[:, 1:] != -100).sum()
        sums = torch.stack([loss.detach() * scored, scored])
        total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        count = count.clamp(min=1)
        return loss * (scored * self.trainer.world_size / count), total / count

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
        parameters = list(self.model.trainable().values())
        if not parameters:
            raise UserError(
                "model.tuning.mode: nothing is left to train. Allowed for fit: full or lora with a layer above "
                "model.memory_layer, or gates_only with --model.fusion gated. Fix: change one of them."
            )
        optimizer = self._optimizer(parameters)
        scheduler: LRScheduler | Any = self._scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained, note which backbone it belongs to, and the random state."""
        trained = {f"model.{name}" for name in self.model.trainable()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        random = gather({"cpu": torch.get_rng_state(), "cuda": cuda})  # of each process
        checkpoint["memlong"] = {"format": CHECKPOINT_FORMAT, "backbone": self._fingerprint, "random": random}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs here, and take over what a resumed run goes on with."""
        fit = self.trainer.state.fn == "fit"
        self.check_checkpoint(checkpoint, complete=fit)
        if fit:
            self._random = checkpoint["memlong"]["random"]
            fresh = self.configure_optimizers()["optimizer"].param_groups
            # A sharding strategy has taken the weights out, and loaded the optimiser already.
            live = [] if "state_dict" in checkpoint else self.trainer.optimizers[0].param_groups
            keep_recipe(checkpoint, fresh, live)

    def check_checkpoint(self, checkpoint: dict[str, Any], complete: bool) -> None:
        """Check that a checkpoint belongs to this backbone and these settings.

        Args:
            checkpoint: Its content.
            complete: Whether it must hold all that is trained now.

        Raises:
            UserError: If it was made with another backbone, or does not hold what is trained now.
        """
        saved, here = checkpoint["memlong"]["backbone"], self._fingerprint
        differ = [f"{k} is {saved.get(k)!r} there and {here[k]!r} here" for k in here if saved.get(k) != here[k]]
        if differ:
            raise UserError(
                f"ckpt_path: the checkpoint was made from another backbone ({'; '.join(differ)}). Allowed: the "
                "backbone it was trained with. Fix: give that one as --model.backbone."
            )
        if "state_dict" not in checkpoint:
            return  # a sharding strategy has loaded it already
        trained = {f"model.{name}" for name in self.model.trainable()}
        missing = sorted(trained - checkpoint["state_dict"].keys())
        extra = sorted(checkpoint["state_dict"].keys() - self.state_dict().keys())
        if extra or (missing and complete):
            names = ", ".join((extra or missing)[:3])
            raise UserError(
                f"ckpt_path: the checkpoint {'holds weights this model lacks' if extra else 'lacks trained weights'} "
                f"({names}, ...). Allowed: the same model.tuning, model.fusion and layers as when it was written. "
                "Fix: leave these options to the checkpoint."
            )

    def on_train_start(self) -> None:
        """Go on with a resumed run's random numbers."""
        random = self.__dict__.pop("_random", None)
        if random is not None:
            mine = random[rank_and_world()[0]]  # as many as there are processes: the data's position checks that
            torch.set_rng_state(mine["cpu"])
            if mine["cuda"]:
                torch.cuda.set_rng_state_all(mine["cuda"])

    def _recognise(self) -> dict[str, Any]:
        """What a frozen backbone is recognised by: its shape and a sum over its frozen weights."""
        config = self.model.backbone.config
        facts = {k: getattr(config, k) for k in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")}
        embedding: Tensor = self.model.backbone.get_input_embeddings().weight  # type: ignore[assignment]
        return facts | {"embedding_sum": round(float(embedding.detach().double().abs().sum()), 1)}


def _to_store(output: MemLongOutput, batch: Batch) -> dict[str, Tensor]:
    """What the bank stores of the window; nothing where there is no bank."""
    if "memory" not in batch:
        return {}
    return {"keys": output.keys, "values": output.values, "hidden": output.memory_hidden}
