"""Rotary positions of keys, for any architecture that follows transformers' layout.

Keys reach an attention function already rotated. Rotating them back by their known positions gives the
unrotated keys of any architecture, fused projections and query/key norms included, without touching its code.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_memlong.errors import UserError

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi-3", "OLMo 2", "SmolLM3", "Granite")
"""Families that are laid out as needed and pass the memory argument on; each is tested in ``tests/parity``."""


class Rotary:
    """Rotates keys forward and back with a backbone's own rotary embedding.

    Args:
        backbone: A decoder whose base model has ``rotary_emb`` and whose modelling file defines
            ``apply_rotary_pos_emb(q, k, cos, sin)``, as all families listed in the README do.

    Raises:
        UserError: If the backbone has no rotary embedding of that form.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        decoder = backbone.get_decoder()
        module = getattr(decoder, "rotary_emb", None)
        apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
        parts = hasattr(decoder, "layers") and hasattr(decoder, "norm")
        if module is None or apply is None or not hasattr(module, "inv_freq") or not parts:
            raise UserError(
                f"model.backbone: {type(backbone).__name__} is not laid out as needed (a decoder with `layers`, `norm` "
                "and one `rotary_emb` that keys can be rotated back by). "
                f"Allowed: {', '.join(FAMILIES)}. Fix: choose a backbone of one of these families."
            )
        self.module: nn.Module = module
        self._apply: Callable[..., tuple[Tensor, Tensor]] = apply

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        # The dtype of the first argument is the dtype of the tables: float32, whatever the model computes in.
        like = torch.empty(0, device=positions.device, dtype=torch.float32)
        cos, sin = self.module(like, positions)
        return cos, sin

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys (B, H, T, D) to ``positions`` (B, T) or (1, T); computed in float32, returned as given."""
        cos, sin = self._tables(positions)
        return self._turn(keys, cos, sin)

    def unrotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Undo :meth:`rotate`: rotate by the opposite angle, and undo the table's scale (YaRN) twice over."""
        cos, sin = self._tables(positions)
        scale = float(getattr(self.module, "attention_scaling", 1.0)) ** 2
        return self._turn(keys, cos / scale, -sin / scale)

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = keys.float()
        no_query = wide[:, :0]  # the function turns queries too; there are none
        return self._apply(no_query, wide, cos, sin)[1].to(keys.dtype)


def memory_positions(mask: Tensor, position: str) -> Tensor:
    """Positions of retrieved tokens (B, M), given which of them are real (``mask``, bool (B, M)).

    Local tokens keep the backbone's positions 0..T-1, so that an empty memory changes nothing at all. Rotary
    attention sees differences of positions only, so ``zero`` (paper, section 2: memory at 0, local at 1..T) is
    memory at -1 here, and ``sequential`` (memory at 0..M-1, local after it) ends at -1.
    """
    if position == "zero":
        return torch.full_like(mask, -1, dtype=torch.long)
    return -mask.long().flip(-1).cumsum(-1).flip(-1)
