"""What of the backbone is trained: everything up to the memory layer is frozen (paper, section 2)."""

import re
from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_memlong.config import TuningConfig
from lightning_memlong.errors import UserError

ADAPTER = "memlong"


class Tuning:
    """Freezes and tunes a backbone in place, and can undo it.

    Not an ``nn.Module``: it owns no weights, it only says which are trained.

    Args:
        backbone: The decoder.
        memory_layer: Layers 0..memory_layer and the embeddings are frozen.
        config: What to train above it.
    """

    def __init__(self, backbone: PreTrainedModel, memory_layer: int, config: TuningConfig) -> None:
        self.backbone, self.memory_layer, self.config = backbone, memory_layer, config
        self._before = {name: p.requires_grad for name, p in backbone.named_parameters()}
        self._lora: LoraModel | None = None
        self._tied: nn.Parameter | None = None
        backbone.requires_grad_(False)
        if config.mode == "lora":
            self._add_adapters()
        if config.mode == "full":
            self.tuned_layers.requires_grad_(True)
        if config.mode in ("full", "lora"):
            for norm in self._norms():
                norm.requires_grad_(config.norms)
            if config.head:
                self._tune_head()

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

    def _tune_head(self) -> None:
        """Train the head; weights it shares with the embeddings stay theirs, or what is stored would go stale."""
        head, embeddings = self.backbone.get_output_embeddings(), self.backbone.get_input_embeddings()
        if head.weight is embeddings.weight:
            self._tied = head.weight  # type: ignore[assignment]
            head.weight = nn.Parameter(head.weight.detach().clone())  # type: ignore[operator]
            self.backbone.config.tie_word_embeddings = False
        head.requires_grad_(True)

    def _add_adapters(self) -> None:
        above = {id(m) for m in self.tuned_layers.modules()}
        linear = [n for n, m in self.backbone.named_modules() if id(m) in above and isinstance(m, nn.Linear)]
        wanted = self.config.lora_targets
        targets = [name for name in linear if name.rsplit(".", 1)[-1] in wanted]
        missing = sorted(set(wanted) - {name.rsplit(".", 1)[-1] for name in targets})
        if missing or not targets:
            names = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(
                f"model.tuning.lora_targets={wanted}: {', '.join(missing) or 'nothing'} matches no linear layer above "
                f"model.memory_layer={self.memory_layer}. Allowed: {', '.join(names) or 'none: no layer is above'}. "
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

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """The backbone's weights under its own names, adapters added in; the backbone itself is not touched.

        peft's ``merge_adapter`` and ``unmerge_adapter`` change the weights in place, and back only to rounding.
        """
        weights = self.backbone.state_dict()
        for name, module in self.backbone.named_modules():
            if isinstance(module, LoraLayer):
                base = weights[f"{name}.base_layer.weight"]
                delta = module.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]
                weights[f"{name}.base_layer.weight"] = (base.float() + delta.float()).to(base.dtype)
        return {name.replace(".base_layer.", "."): w for name, w in weights.items() if ".lora_" not in name}

    def undo(self) -> None:
        """Take adapters off, tie the head again and restore every ``requires_grad`` flag."""
        if self._lora is not None:
            self._lora.unload()
            self._lora = None
        if self._tied is not None:
            self.backbone.get_output_embeddings().weight = self._tied
            self.backbone.config.tie_word_embeddings, self._tied = True, None
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self._before[name])


def describe(parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, str, int]]:
    """Parameters, those of all layers in one line: name, shape, count of numbers.

    ``layers.12.x`` to ``layers.29.x`` become ``layers.12-29.x``.
    """
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name, parameter in parameters.items():
        number = re.search(r"(?:layers|gates|memory_bias|memory_scale)\.(\d+)", name)
        pattern = name if number is None else f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
        shape = " x ".join(map(str, parameter.shape))
        groups.setdefault((pattern, shape), []).append((int(number[1]) if number else -1, parameter.numel()))
    return [
        (pattern.format(spans([layer for layer, _ in found])), shape, sum(count for _, count in found))
        for (pattern, shape), found in groups.items()
    ]


def spans(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3,7``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
