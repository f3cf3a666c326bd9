"""What of the backbone is trained: everything up to the memory layer is frozen (paper, section 2)."""

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import PreTrainedModel

from lightning_memlong.config import TuningConfig
from lightning_memlong.errors import UserError

ADAPTER = "memlong"


class Tuning:
    """Freezes and tunes a backbone in place, and can undo it.

    Not an ``nn.Module``: it owns no weights, it only says which are trained.

    Args:
        backbone: The decoder.
        memory_layer: Layers 0..memory_layer and the embeddings are frozen; so is the output head.
        config: What to train above it.
    """

    def __init__(self, backbone: PreTrainedModel, memory_layer: int, config: TuningConfig) -> None:
        self.backbone, self.memory_layer, self.config = backbone, memory_layer, config
        self._before = {name: p.requires_grad for name, p in backbone.named_parameters()}
        self._lora: LoraModel | None = None
        backbone.requires_grad_(False)
        if config.mode == "lora":
            self._add_adapters()
        if config.mode == "full":
            self.tuned_layers.requires_grad_(True)
        if config.mode in ("full", "lora"):
            for norm in self._norms():
                norm.requires_grad_(config.norms)

    @property
    def layers(self) -> nn.ModuleList:
        """All decoder layers."""
        return self.backbone.get_decoder().layers

    @property
    def tuned_layers(self) -> nn.ModuleList:
        """The decoder layers above the memory layer."""
        return self.layers[self.memory_layer + 1 :]  # type: ignore[return-value]

    def _norms(self) -> list[nn.Module]:
        inside = [m for m in self.tuned_layers.modules() if "norm" in type(m).__name__.lower()]
        return [*inside, self.backbone.get_decoder().norm]

    def _add_adapters(self) -> None:
        names = {
            name: module
            for name, module in self.backbone.named_modules()
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in self.config.lora_targets
        }
        above = {id(m) for m in self.tuned_layers.modules()}
        targets = [name for name, module in names.items() if id(module) in above]
        if not targets:
            linear = sorted({n.rsplit(".", 1)[-1] for n, m in self.backbone.named_modules() if id(m) in above
                             and isinstance(m, nn.Linear)})  # fmt: skip
            raise UserError(
                f"model.tuning.lora_targets={self.config.lora_targets} matches no linear layer above "
                f"model.memory_layer={self.memory_layer}. Allowed: {', '.join(linear) or 'none: no layer is above'}. "
                "Fix: choose among these, or lower the memory layer."
            )
        config = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.config.lora_dropout,
            target_modules=targets,
            bias="none",
        )
        # LoraModel changes the backbone in place; it is held by an attribute of a plain object so that its
        # parameters are registered once, under the backbone.
        self._lora = LoraModel(self.backbone, {ADAPTER: config}, ADAPTER)

    def freeze_modes(self) -> None:
        """Put every frozen layer in evaluation mode (no dropout below the memory layer)."""
        for layer in self.layers[: self.memory_layer + 1]:
            layer.eval()

    def undo(self) -> None:
        """Take adapters off and restore every ``requires_grad`` flag."""
        if self._lora is not None:
            self._lora.unload()
            self._lora = None
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self._before[name])
