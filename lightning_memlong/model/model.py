"""MemLong: a Hugging Face decoder with a frozen lower half and retrieval causal attention above it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lightning_memlong.attention.functional import BACKENDS
from lightning_memlong.backbone.layers import LayerIndex, choose_layers, text_config, unlimited_layers
from lightning_memlong.backbone.lm_head import Head
from lightning_memlong.backbone.loading import load_backbone
from lightning_memlong.backbone.rope import FAMILIES, Rotary
from lightning_memlong.backbone.tuning import Tuning
from lightning_memlong.bank import Retrieved
from lightning_memlong.config import MemoryConfig, TuningConfig, require_choice
from lightning_memlong.errors import UserError
from lightning_memlong.generation.long_context import LongText
from lightning_memlong.memlong import from_pretrained
from lightning_memlong.model.attention_interface import CarriedMemory, Enough, keep_hidden
from lightning_memlong.model.context import captured, carry
from lightning_memlong.model.export import export, load_gates
from lightning_memlong.model.output import MemLongOutput
from lightning_memlong.model.probe import probe

SOURCES = ("single", "per_layer")
FUSIONS = ("joint", "gated")
POSITIONS = ("zero", "sequential")


class MemLong(LongText, nn.Module):
    """Wraps any supported decoder: freezes layers 0..memory_layer, captures K/V, reads retrieved K/V above.

    Args:
        backbone: A loaded decoder, or its name, folder or hub id.
        memory_layer: Layer whose keys and values are stored: its index from 0 (paper: 13 of 26), or a fraction of the
            depth (0.5 of 26 layers is 13).
        retrieval_layers: Layers that attend to memory, likewise; None: memory_layer and all above it, but in a backbone
            that mixes sliding-window and unlimited layers only the unlimited ones.
        source: ``single`` stores K/V of the memory layer only (the paper); ``per_layer`` lets each retrieval
            layer store and read its own.
        fusion: ``joint`` softmax over memory and local tokens, or ``gated`` (zero-initialised, the paper).
        position: ``zero`` puts all retrieved tokens just before the window (the paper); ``sequential`` gives
            them running positions.
        tuning: What of the layers above the memory layer is trained.
        gradient_checkpointing: Recompute layers in the backward pass instead of keeping activations.
        attention: Kernels: ``auto``, ``sdpa`` or ``flex`` (see docs/design.md).
        bos: Token put before each window and taken off again, as a text begins with it in training; None: none. Some
            backbones cannot do without (Gemma 3 270M: perplexity 105 without, 32 with).

    Raises:
        UserError: For layers out of range, a memory layer above a retrieval layer, or a backbone whose
            attention does not receive the memory argument.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | str,
        memory_layer: LayerIndex,
        retrieval_layers: Sequence[LayerIndex] | None = None,
        source: str = "per_layer",
        fusion: str = "joint",
        position: str = "sequential",
        tuning: TuningConfig | None = None,
        gradient_checkpointing: bool = False,
        attention: str = "auto",
        bos: int | None = None,
    ) -> None:
        super().__init__()
        require_choice("model.source", source, SOURCES)
        require_choice("model.fusion", fusion, FUSIONS)
        require_choice("model.position", position, POSITIONS)
        require_choice("model.attention", attention, BACKENDS)
        self.backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
        self.name = backbone if isinstance(backbone, str) else backbone.config._name_or_path
        self.config = config = text_config(self.backbone)
        self._was_training = self.backbone.training
        self.source, self.fusion, self.position, self.attention = source, fusion, position, attention
        self.bos = bos
        whole = unlimited_layers(getattr(config, "layer_types", None), config.num_hidden_layers)
        layers = choose_layers(memory_layer, retrieval_layers, config.num_hidden_layers, whole)
        self.memory_layer, self.retrieval_layers = layers
        self.rotary = Rotary(self.backbone)
        self.head = Head(self.backbone)
        self._plain_attention = self.backbone.config._attn_implementation
        memory_layer_module = self.backbone.get_decoder().layers[self.memory_layer]
        self._hook = memory_layer_module.register_forward_hook(keep_hidden, with_kwargs=True)
        self._wrap_attention()
        gated = self.retrieval_layers if fusion == "gated" else []
        heads = config.num_attention_heads
        self.gates = nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(heads)) for layer in gated})
        self.tuning = Tuning(self.backbone, self.memory_layer, tuning or TuningConfig())
        if isinstance(backbone, str):
            load_gates(backbone, self.gates)
        self.gates.requires_grad_(self.tuning.config.mode != "none")
        self._checkpointed = gradient_checkpointing
        if gradient_checkpointing:
            _checkpointing(self.backbone, "enable")({"use_reentrant": False})
        self.train(self.training)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def stored_layers(self) -> list[int]:
        """Layers whose K/V go into the bank, in the order of the bank's layer axis."""
        return [self.memory_layer] if self.source == "single" else self.retrieval_layers

    @torch.no_grad()
    def _wrap_attention(self) -> None:
        """Switch the attention, and prove on a few tokens that all is as it must be, whatever the architecture."""
        self.backbone.eval()
        try:
            problem = probe(self)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, ValueError, RuntimeError) as error:
            problem = f"its attention does not take the memory argument ({str(error).splitlines()[0]})"
        self.backbone.train(self._was_training)
        if problem:
            self._restore_attention()
            raise UserError(
                f"model.backbone: {type(self.backbone).__name__} cannot be given a memory: {problem}. "
                f"Allowed: {', '.join(FAMILIES)}. Fix: choose a backbone of one of these families."
            )

    def _restore_attention(self) -> None:
        self.backbone.set_attn_implementation(self._plain_attention)
        self.rotary.release()
        self._hook.remove()

    def decode(self, input_ids: Tensor, carried: CarriedMemory, cache: Cache | None = None) -> Tensor:
        """Last hidden states (B, T, E); with a cache, of tokens that follow those in it."""
        decoder = self.backbone.get_decoder()
        return decoder(
            input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, memory=carried
        ).last_hidden_state

    def train(self, mode: bool = True) -> "MemLong":
        """Set training mode, but leave the frozen layers in evaluation mode: they must not drop anything out."""
        super().train(mode)
        if hasattr(self, "tuning"):
            self.tuning.freeze_modes()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemLong":
        """Keep rotary tables and gates in float32 whatever the model is cast to."""
        super()._apply(fn, recurse)
        self.rotary.restore()
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
            memory: What the bank gathered for this window; None or empty is the plain backbone. With G times B rows,
                row b * G + g is for the g-th of G equal parts of row b's tokens (granularity ``chunk``).
            logits_to_keep: Logits and loss of the last so many positions only; 0: all.

        Returns:
            Loss, logits and the window's unrotated keys and values.
        """
        carried = carry(self, memory, input_ids, self.bos)
        hidden = self.decode(_prefixed(input_ids, self.bos), carried)[:, carried.prefix :][:, -logits_to_keep:]
        loss = None if labels is None else self.head.loss(hidden, labels[:, -hidden.shape[1] :])
        if loss is not None and not carried.memory:
            # Gates take no part in a window without memory; where only they are trained there must still be a graph.
            loss = loss + 0.0 * sum(gate.sum() for gate in self.gates.values())
        assert carried.hidden is not None
        states = carried.hidden[:, carried.prefix :]
        return MemLongOutput(loss, hidden, self.head.logits, lambda: captured(self, carried), carried.mass, states)

    @torch.no_grad()
    def capture(
        self, input_ids: Tensor, memory: Retrieved | None = None, bos: int | None = None, hidden: bool = False
    ) -> dict[str, Tensor]:
        """What a bank stores of a window, without gradients; layers above what is stored are not computed.

        Args:
            input_ids: (B, T), as for :meth:`forward`.
            memory: What the window attends to.
            bos: Token put before the window; None: the model's own, if it has one.
            hidden: Whether the memory layer's hidden states are wanted.

        Returns:
            ``keys`` and ``values`` as in :class:`MemLongOutput`, and ``hidden`` (B, T, E) if wanted.
        """
        bos = self.bos if bos is None else bos
        carried = carry(self, memory, input_ids, bos)
        last = max(self.stored_layers[-1], self.memory_layer + 1 if hidden else 0)
        carried.last = last if last < self.config.num_hidden_layers else None
        try:
            self.decode(_prefixed(input_ids, bos), carried)
        except Enough:
            pass
        keys, values = captured(self, carried)
        if not hidden:
            return {"keys": keys, "values": values}
        assert carried.hidden is not None
        return {"keys": keys, "values": values, "hidden": carried.hidden[:, carried.prefix :]}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name: the tuned part of the backbone, and the gates."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def unwrap(self) -> PreTrainedModel:
        """Give back the backbone as it was handed in: attention, gradient flags and modules restored.

        Weights that were tuned in full stay as tuned; adapters are taken off without being merged, and a head that was
        untied from the embeddings is tied again: :meth:`save_pretrained` keeps both.
        """
        self.tuning.undo()
        if self._checkpointed:
            _checkpointing(self.backbone, "disable")()
        self._restore_attention()
        return self.backbone.train(self._was_training)

    def settings(self) -> dict[str, Any]:
        """What, besides weights, the model is: options of the ``model`` group that make the same one again."""
        names = ("memory_layer", "retrieval_layers", "source", "fusion", "position")
        return {name: getattr(self, name) for name in names} | {"prepend_bos": False if self.bos is None else self.bos}

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write a plain Hugging Face folder, adapters merged in, gates and settings beside the weights.

        Args:
            folder: Where to; must not exist yet.
            tokenizer: Saved beside the weights, if given.

        Raises:
            UserError: If the folder is there already or cannot be written.
        """
        return export(self, folder, tokenizer)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, memory: MemoryConfig | Mapping[str, Any] | None = None, **settings: Any
    ) -> "MemLong":
        """A model ready to read and write, in evaluation mode.

        Args:
            folder: A checkpoint of ``train.py fit`` or its run folder; what ``train.py export`` or
                :meth:`save_pretrained` wrote; or any backbone's name, folder or hub id.
            memory: Memory settings, or those that differ from the ones stored with the weights.
            **settings: Arguments of :class:`MemLong` that win over the stored ones.

        Raises:
            UserError: If it cannot be loaded, or its gates were trained for other layers.
        """
        return from_pretrained(cls, str(folder), memory, settings)

    def extra_repr(self) -> str:
        """Settings shown by ``print(model)``."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())


def _prefixed(input_ids: Tensor, bos: int | None) -> Tensor:
    return input_ids if bos is None else F.pad(input_ids, (1, 0), value=bos)


def _checkpointing(backbone: PreTrainedModel, what: str) -> Callable[..., None]:
    """The method that switches it, by the name it has in this version of transformers."""
    name = f"activation_checkpointing_{what}"
    return getattr(backbone, name if hasattr(backbone, name) else f"gradient_checkpointing_{what}")
