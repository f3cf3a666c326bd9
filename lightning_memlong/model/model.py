"""The network: a Hugging Face decoder with a frozen lower half and retrieval causal attention above it."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_memlong.backbone import (
    FAMILIES,
    Head,
    Rotary,
    Tuning,
    attention_of,
    compile_layers,
    gradient_checkpointing,
    leave_uncompiled,
    load_backbone,
    text_config,
)
from lightning_memlong.bank import Retrieved
from lightning_memlong.config import ModelConfig, TuningConfig
from lightning_memlong.errors import UserError
from lightning_memlong.model.attention_interface import decode, register_attention
from lightning_memlong.model.context import ContextFactory, StopForward, keep_hidden
from lightning_memlong.model.export import export, load_gates
from lightning_memlong.model.layout import MemoryLayout, lay_out
from lightning_memlong.model.memory_weights import find_memory_weights, take_memory_weights
from lightning_memlong.model.output import MemLongOutput
from lightning_memlong.model.probe import probe

log = logging.getLogger(__name__)


class MemLongModel(nn.Module):
    """Wraps any supported decoder: freezes layers 0..memory_layer, captures K/V, reads retrieved K/V above.

    Args:
        backbone: A loaded decoder, or its name, folder or hub id.
        config: All settings; or give them as keywords.
        tuning: What of the layers above the memory layer is trained.
        bos: Token put before each window and taken off again, as a text begins with it in training; None: none. Some
            backbones cannot do without (Gemma 3 270M: perplexity 105 without, 32 with).
        **settings: Fields of :class:`ModelConfig`, such as ``memory_layer``.

    Raises:
        UserError: For layers out of range, a memory layer above a retrieval layer, or a backbone whose
            attention does not receive the memory argument.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | str,
        config: ModelConfig | None = None,
        *,
        tuning: TuningConfig | None = None,
        bos: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        chosen = config or ModelConfig(**settings)
        self.backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
        self.name: str = backbone if isinstance(backbone, str) else str(backbone.name_or_path)
        self.config = text_config(self.backbone)
        """The decoder's own."""
        self._was_training = self.backbone.training
        self.bos = bos
        learned_before = find_memory_weights(self.name, self.backbone, chosen)
        self.layout = lay_out(self.config, chosen, learned_before)
        self.rotary = Rotary(self.backbone)
        self.head = Head(self.backbone)
        self._plain_attention = attention_of(self.backbone)
        memory_layer_module = self.backbone.get_decoder().layers[self.memory_layer]
        self._hook = memory_layer_module.register_forward_hook(keep_hidden, with_kwargs=True)
        self._wrap_attention()
        gated = self.retrieval_layers if chosen.fusion == "gated" else []
        heads = self.config.num_attention_heads
        self.gates = nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(heads)) for layer in gated})
        self.memory_bias = self._one_a_head(self.layout.learns_bias)
        self.memory_scale = self._one_a_head(self.layout.learns_scale)
        learned: Any = self._numbers()  # live mappings, though PyTorch does not call them so
        self.contexts = ContextFactory(self.layout, self.rotary, *learned)
        self.tuning = Tuning(self.backbone, self.memory_layer, tuning or TuningConfig())
        if isinstance(backbone, str):
            load_gates(backbone, self.gates)
        self.calibrated: Mapping[str, Any] = {}
        """What the biases that somebody asked for were learned with."""
        if learned_before is not None:
            take_memory_weights(self, learned_before)
        for learned in self._numbers():
            learned.requires_grad_(self.tuning.config.mode != "none")
        self._checkpointed = chosen.gradient_checkpointing
        self._compute_as(chosen)
        self.train(self.training)

    def _compute_as(self, chosen: ModelConfig) -> None:
        if chosen.gradient_checkpointing:
            gradient_checkpointing(self.backbone, True)
        if chosen.compile is not None:
            compile_layers(self.backbone, chosen.compile)

    def _one_a_head(self, wanted: bool) -> nn.ParameterDict:
        heads, layers = self.config.num_attention_heads, self.retrieval_layers if wanted else []
        return nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(heads)) for layer in layers})

    def _numbers(self) -> tuple[nn.ParameterDict, ...]:
        """What is learned of reading memory, apart from weights: for each layer, one number a head."""
        return self.gates, self.memory_bias, self.memory_scale

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def memory_layer(self) -> int:
        """Layer whose output is frozen; with source ``single``, whose keys and values are stored."""
        return self.layout.memory_layer

    @property
    def retrieval_layers(self) -> list[int]:
        """Layers that attend to memory."""
        return self.layout.retrieval_layers

    @property
    def stored_layers(self) -> list[int]:
        """Layers whose K/V go into the bank, in the order of the bank's layer axis."""
        return self.layout.stored_layers

    @torch.no_grad()
    def _wrap_attention(self) -> None:
        """Switch the attention, and prove on a few tokens that all is as it must be, whatever the architecture."""
        self.backbone.eval()
        wanted = {*self.stored_layers, *self.retrieval_layers}
        cause: Exception | None = None
        try:
            problem = probe(self.backbone, self.rotary, self.head, wanted)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:  # an AttributeError would be ours
            problem = f"its attention does not take the memory argument ({str(error).splitlines()[0]})"
            cause = error
        self.backbone.train(self._was_training)
        if problem:
            self._restore_attention()
            raise UserError(
                f"model.backbone: {type(self.backbone).__name__} cannot be given a memory: {problem}. "
                f"Allowed: {', '.join(FAMILIES)}. Fix: choose a backbone of one of these families."
            ) from cause

    def _restore_attention(self) -> None:
        self.backbone.set_attn_implementation(self._plain_attention)
        self.rotary.release()
        self._hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let transformers know the attention in another process too."""
        super().__setstate__(state)
        register_attention()

    def train(self, mode: bool = True) -> "MemLongModel":
        """Set training mode, but leave the frozen layers in evaluation mode: they must not drop anything out."""
        super().train(mode)
        if hasattr(self, "tuning"):
            self.tuning.freeze_modes()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemLongModel":
        """Keep rotary tables, and what is learned of reading memory, in float32 whatever the model is cast to."""
        super()._apply(fn, recurse)
        self.rotary.restore()
        for learned in self._numbers():
            for number in learned.values():
                number.data = number.data.float()
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
            memory: What the bank gathered for this window; None or empty is the plain backbone. With G times B rows,
                row b * G + g is for the g-th of G equal parts of row b's tokens (granularity ``chunk``).
            logits_to_keep: Logits and loss of the last so many positions only; 0: all.

        Returns:
            Loss, logits and the window's unrotated keys and values.
        """
        context = self.contexts.new_context(memory, input_ids, self.bos)
        hidden = decode(self.backbone, _prefixed(input_ids, self.bos), context)[:, context.prefix :][
            :, -logits_to_keep:
        ]
        loss = None if labels is None else self.head.loss(hidden, labels[:, -hidden.shape[1] :])
        if loss is not None:
            # They take no part in a window without memory, or with none but near; where only they are trained there
            # must still be a graph. A sum of none of them is 0 whatever they are: a bias may be minus infinity.
            loss = loss + sum(n[:0].sum() for learned in self._numbers() for n in learned.values())
        assert context.hidden is not None
        states = context.hidden[:, context.prefix :]
        return MemLongOutput(
            loss, hidden, self.head.logits, lambda: self.contexts.captured_kv(context), context.memory_mass, states,
            context.chunk_use,
        )  # fmt: skip

    @torch.no_grad()
    def capture(
        self, input_ids: Tensor, memory: Retrieved | None = None, bos: int | None = None, hidden: bool = False
    ) -> dict[str, Tensor]:
        """What a bank stores of a window, without gradients; layers above what is wanted are not computed.

        Args:
            input_ids: (B, T), as for :meth:`forward`.
            memory: What the window attends to.
            bos: Token put before the window; None: the model's own, if it has one.
            hidden: Whether the memory layer's hidden states are wanted.

        Returns:
            ``keys`` and ``values`` as in :class:`MemLongOutput`, ``hidden`` (B, T, E) if wanted, and ``chunk_use`` as
            there where the memory asks for it.
        """
        bos = self.bos if bos is None else bos
        context = self.contexts.new_context(memory, input_ids, bos)
        last = max(self.stored_layers[-1], self.memory_layer + 1 if hidden else 0)
        if context.readers is not None:  # all layers that read are asked
            last = max(last, self.retrieval_layers[-1] + 1)
        context.stop_at_layer = last if last < self.config.num_hidden_layers else None
        try:
            decode(self.backbone, _prefixed(input_ids, bos), context)
        except StopForward:
            pass
        found = dict(zip(("keys", "values"), self.contexts.captured_kv(context), strict=True))
        if hidden:
            assert context.hidden is not None
            found["hidden"] = context.hidden[:, context.prefix :]
        if (use := context.chunk_use) is not None:
            found["chunk_use"] = use
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name: the tuned part of the backbone, gates, biases and scales."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def unwrap(self) -> PreTrainedModel:
        """Give back the backbone as it was handed in: attention, gradient flags and modules restored.

        Weights that were tuned in full stay as tuned; adapters are taken off without being merged, and a head that was
        untied from the embeddings is tied again: :meth:`save_pretrained` keeps both.
        """
        self.tuning.undo()
        if self._checkpointed:
            gradient_checkpointing(self.backbone, False)
        leave_uncompiled(self.backbone)
        self._restore_attention()
        return self.backbone.train(self._was_training)

    def settings(self) -> dict[str, Any]:
        """What, besides weights, the model is: options of the ``model`` group that make the same one again."""
        own = (f.name for f in fields(MemoryLayout) if f.name not in ("attention", "stored"))  # kernels are a run's
        found = {name: getattr(self.layout, name) for name in own}
        return found | {"prepend_bos": False if self.bos is None else self.bos}

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write a plain Hugging Face folder, adapters merged in, gates and settings beside the weights.

        Args:
            folder: Where to; must not exist yet.
            tokenizer: Saved beside the weights, if given.

        Raises:
            UserError: If the folder is there already or cannot be written.
        """
        return export(self, folder, tokenizer)

    def extra_repr(self) -> str:
        """Settings shown by ``print(model)``."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())


def _prefixed(input_ids: Tensor, bos: int | None) -> Tensor:
    return input_ids if bos is None else F.pad(input_ids, (1, 0), value=bos)
