"""Layers through torch.compile."""

import torch
from transformers import PreTrainedModel

from lightning_memlong.config import require_choice


def compile_layers(backbone: PreTrainedModel, backend: str) -> None:
    """Compile each decoder layer where it stands, so that names of weights stay as they are.

    Attention is left out (:func:`lightning_memlong.model.attention_interface.memory_attention_forward`): what it is
    handed differs from window to window, and would have the layers compiled anew.

    Args:
        backbone: The decoder.
        backend: Of torch.compile.

    Raises:
        UserError: If there is no such backend.
    """
    require_choice("model.compile", backend, [*torch.compiler.list_backends(), "aot_eager", "eager"])
    for layer in backbone.get_decoder().layers:
        layer.compile(backend=backend)


def leave_uncompiled(backbone: PreTrainedModel) -> None:
    """Undo :func:`compile_layers`; PyTorch has no method for it."""
    for layer in backbone.get_decoder().layers:
        layer._compiled_call_impl = None
