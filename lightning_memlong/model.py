"""MemLong: a Hugging Face decoder with a frozen lower half and retrieval causal attention above it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_memlong.attention import CarriedMemory, OnDemand, register_attention
from lightning_memlong.backbones import load_backbone
from lightning_memlong.config import TuningConfig, require, require_choice
from lightning_memlong.errors import UserError
from lightning_memlong.retrieved import Retrieved
from lightning_memlong.rotary import FAMILIES, Rotary, memory_positions
from lightning_memlong.tuning import Tuning

SOURCES = ("single", "per_layer")
FUSIONS = ("joint", "gated")
POSITIONS = ("zero", "sequential")


@dataclass
class MemLongOutput:
    """What one pass over a window gives."""

    loss: Tensor | None
    """Mean next-token loss over labelled tokens, float32; None without labels."""
    logits: Tensor
    """(B, T or logits_to_keep, vocabulary)."""
    keys: Tensor
    """The window's keys before rotary embedding, detached: (B, H_kv, T, D) for source ``single``,
    (layers, B, H_kv, T, D) for ``per_layer``."""
    values: Tensor
    """The window's values, shaped as ``keys``."""


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy in float32, labels (B, T) aligned with the inputs and -100 where not scored.

    ``mean`` is over scored tokens and 0 where there is none; ``none`` gives (B, T), 0 where not scored. The
    first token of a window has nothing to be predicted from and is never scored.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    ).view_as(targets)
    if reduction == "none":
        return F.pad(losses, (1, 0))
    return losses.sum() / (targets != -100).sum().clamp(min=1)


class MemLong(nn.Module):
    """Wraps any supported decoder: freezes layers 0..memory_layer, captures K/V, reads retrieved K/V above.

    Args:
        backbone: A loaded decoder, or its name, folder or hub id.
        memory_layer: Index of the layer whose keys and values are stored, counted from 0 (paper: 13 of 26).
        retrieval_layers: Layers that attend to memory; None: memory_layer and all above it.
        source: ``single`` stores K/V of the memory layer only (the paper); ``per_layer`` lets each retrieval
            layer store and read its own.
        fusion: ``joint`` softmax over memory and local tokens, or ``gated`` (zero-initialised, the paper).
        position: ``zero`` puts all retrieved tokens just before the window (the paper); ``sequential`` gives
            them running positions.
        tuning: What of the layers above the memory layer is trained.
        gradient_checkpointing: Recompute layers in the backward pass instead of keeping activations.

    Raises:
        UserError: For layers out of range, a memory layer above a retrieval layer, or a backbone whose
            attention does not receive the memory argument.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | str,
        memory_layer: int,
        retrieval_layers: list[int] | None = None,
        source: str = "per_layer",
        fusion: str = "joint",
        position: str = "sequential",
        tuning: TuningConfig | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        require_choice("model.source", source, SOURCES)
        require_choice("model.fusion", fusion, FUSIONS)
        require_choice("model.position", position, POSITIONS)
        self.backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
        self.source, self.fusion, self.position = source, fusion, position
        self.memory_layer = memory_layer
        self.retrieval_layers = self._checked_layers(memory_layer, retrieval_layers)
        self.rotary = Rotary(self.backbone)
        self._plain_attention = self.backbone.config._attn_implementation
        self._wrap_attention()
        heads = self.backbone.config.num_attention_heads
        gated = self.retrieval_layers if fusion == "gated" else []
        self.gates = nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(heads)) for layer in gated})
        self.tuning = Tuning(self.backbone, memory_layer, tuning or TuningConfig())
        self.gates.requires_grad_(self.tuning.config.mode != "none")
        if gradient_checkpointing:
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.train(self.training)

    @property
    def stored_layers(self) -> list[int]:
        """Layers whose K/V go into the bank, in the order of the bank's layer axis."""
        return [self.memory_layer] if self.source == "single" else self.retrieval_layers

    def _checked_layers(self, memory_layer: int, retrieval_layers: list[int] | None) -> list[int]:
        count = self.backbone.config.num_hidden_layers
        last = count - 1
        fix = f"the backbone has {count} layers, counted from 0"
        require(0 <= memory_layer <= last, "model.memory_layer", memory_layer, f"0..{last}", fix)
        layers = list(range(memory_layer, count)) if retrieval_layers is None else sorted(set(retrieval_layers))
        require(bool(layers), "model.retrieval_layers", retrieval_layers, "at least one layer", "name one, or null")
        require(0 <= layers[0] and layers[-1] <= last, "model.retrieval_layers", layers, f"0..{last}", fix)
        require(
            layers[0] >= memory_layer,
            "model.retrieval_layers",
            layers,
            f"layers from model.memory_layer={memory_layer} up (memory cannot be read below the layer that stores it)",
            "lower --model.memory_layer or drop the layers below it",
        )
        return layers

    @torch.no_grad()
    def _wrap_attention(self) -> None:
        """Switch the attention, and prove by two tokens that logits stay and every layer is handed the argument."""
        device = next(self.backbone.parameters()).device
        training = self.backbone.training
        self.backbone.eval()
        wanted = frozenset({*self.stored_layers, *self.retrieval_layers})
        carried = CarriedMemory(capture=wanted)
        probe = torch.arange(2, device=device)[None]
        plain = self.backbone(input_ids=probe).logits
        self.backbone.set_attn_implementation(register_attention())
        try:
            wrapped = self.backbone(input_ids=probe, memory=carried).logits
            works = set(carried.captured) == wanted and torch.allclose(plain, wrapped, atol=1e-3, rtol=1e-3)
        except (TypeError, AttributeError, ValueError):
            works = False
        self.backbone.train(training)
        if not works:
            self.backbone.set_attn_implementation(self._plain_attention)
            raise UserError(
                f"model.backbone: the attention of {type(self.backbone).__name__} does not receive the memory "
                "argument, or computes something that plain attention with memory cannot (soft-capping, sinks). "
                f"Allowed: {', '.join(FAMILIES)}. Fix: choose a backbone of one of these families."
            )

    def _turned(self, layer: int) -> bool:
        """Whether a layer rotates its keys; SmolLM3 leaves every fourth layer without positions."""
        return bool(getattr(self.backbone.get_decoder().layers[layer].self_attn, "use_rope", True))

    def train(self, mode: bool = True) -> "MemLong":
        """Set training mode, but leave the frozen layers in evaluation mode: they must not drop anything out."""
        super().train(mode)
        if hasattr(self, "tuning"):
            self.tuning.freeze_modes()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemLong":
        """Keep rotary tables and gates in float32 whatever the model is cast to.

        ``.to(bfloat16)`` also casts ``inv_freq``, which moved perplexity from 33 to 2,059 at late positions.
        """
        buffers = {name: buffer for name, buffer in self.rotary.module.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in self.rotary.module.named_buffers(recurse=False):
            if buffers[name].is_floating_point():
                setattr(self.rotary.module, name, buffers[name].to(buffer.device))
        for gate in self.gates.values():
            gate.data = gate.data.float()
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        memory: Retrieved | None = None,
        logits_to_keep: int = 0,
    ) -> MemLongOutput:
        """Read one window.

        Args:
            input_ids: (B, T); padding on the right needs no mask, since no earlier token sees it.
            labels: (B, T), aligned with ``input_ids``, -100 where not scored.
            memory: What the bank gathered for this window; None or empty is the plain backbone.
            logits_to_keep: Compute logits of the last so many positions only; 0: all.

        Returns:
            Loss, logits and the window's unrotated keys and values.
        """
        carried = self._carry(memory, input_ids)
        logits = self.backbone(
            input_ids=input_ids, use_cache=False, memory=carried, logits_to_keep=logits_to_keep
        ).logits
        loss = None if labels is None else next_token_loss(logits, labels[:, -logits.shape[1] :])
        if loss is not None and not carried.memory:
            # Gates take no part in a window without memory; where only they are trained there must still be a graph.
            loss = loss + 0.0 * sum(gate.sum() for gate in self.gates.values())
        keys, values = self._captured(carried)
        return MemLongOutput(loss, logits, keys, values)

    def _carry(self, memory: Retrieved | None, input_ids: Tensor) -> CarriedMemory:
        capture = frozenset(self.stored_layers)
        if memory is None or memory.mask.shape[1] == 0 or not bool(memory.mask.any()):
            return CarriedMemory(capture=capture)
        mask = memory.mask.to(input_ids.device)
        at_layers = OnDemand(self.retrieval_layers, lambda: self._rotated(memory, mask))
        return CarriedMemory(
            memory=at_layers,
            mask=None if bool(mask.all()) else mask,
            fusion=self.fusion,
            gates=self.gates,  # type: ignore[arg-type]
            capture=capture,
        )

    @torch.no_grad()
    def _rotated(self, memory: Retrieved, mask: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each retrieval layer, the retrieved keys at their positions, and the values."""
        keys, values = (t.to(mask.device) for t in (memory.keys, memory.values))
        if keys.dim() == 4:
            keys, values = keys[None], values[None]
        layers, rows, heads, tokens, size = keys.shape
        if layers != len(self.stored_layers):
            raise UserError(
                f"memory: holds K/V of {layers} layers, the model stores {len(self.stored_layers)} "
                f"(model.source={self.source}). Fix: use a bank filled by a model with the same settings."
            )
        positions = memory_positions(mask, self.position)
        # One rotation for all layers: they share positions, so layers stand in for heads.
        folded = keys.transpose(0, 1).reshape(rows, layers * heads, tokens, size)
        rotated = self.rotary.rotate(folded, positions).view(rows, layers, heads, tokens, size)
        at = {layer: 0 if layers == 1 else i for i, layer in enumerate(self.retrieval_layers)}
        return {layer: (rotated[:, i] if self._turned(layer) else keys[i], values[i]) for layer, i in at.items()}

    @torch.no_grad()
    def _captured(self, carried: CarriedMemory) -> tuple[Tensor, Tensor]:
        rotated = torch.stack([carried.captured[layer][0] for layer in self.stored_layers])
        values = torch.stack([carried.captured[layer][1] for layer in self.stored_layers])
        layers, rows, heads, tokens, size = rotated.shape
        positions = torch.arange(tokens, device=rotated.device)[None]
        keys = self.rotary.unrotate(rotated.view(layers * rows, heads, tokens, size), positions).view_as(rotated)
        for i, layer in enumerate(self.stored_layers):
            if not self._turned(layer):
                keys[i] = rotated[i]
        return (keys[0], values[0]) if self.source == "single" else (keys, values)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name: the tuned part of the backbone, and the gates."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def unwrap(self) -> PreTrainedModel:
        """Give back the backbone as it was handed in: attention, gradient flags and modules restored.

        Weights that were tuned in full stay as tuned; adapters are taken off without being merged.
        """
        self.tuning.undo()
        self.backbone.gradient_checkpointing_disable()
        self.backbone.set_attn_implementation(self._plain_attention)
        return self.backbone

    def extra_repr(self) -> str:
        """Settings shown by ``print(model)``."""
        settings: dict[str, Any] = {k: getattr(self, k) for k in ("memory_layer", "source", "fusion", "position")}
        return ", ".join(f"{k}={v}" for k, v in settings.items()) + f", retrieval_layers={self.retrieval_layers}"
