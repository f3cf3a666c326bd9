"""Rotary positions of keys, for any architecture that follows transformers' layout.

Keys reach an attention function already rotated. Rotating them back by their known positions gives the
unrotated keys of any architecture, fused projections and query/key norms included, without touching its code.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_memlong.backbone.layers import text_config
from lightning_memlong.backbone.transformers_private import rotary_parts
from lightning_memlong.errors import UserError

FAMILIES = (
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3 (text)", "Phi-3", "OLMo 2", "SmolLM3", "Granite",
)  # fmt: skip
"""Families that are laid out as needed and pass the memory argument on; each is tested in ``tests/parity``."""

UNTURNED = "unturned"
"""Table of a layer without positions (SmolLM3 has one every fourth layer)."""


class Rotary:
    """Rotates keys forward and back with a backbone's own rotary embedding.

    Most backbones have one table of angles for all layers. Some have one for each type of layer (Gemma 3: local and
    global) or leave layers unrotated; :meth:`recognise` finds out which layer has which by trying.

    Args:
        backbone: A decoder whose base model has ``rotary_emb`` and whose modelling file defines
            ``apply_rotary_pos_emb(q, k, cos, sin)``, as all families listed in the README do.

    Raises:
        UserError: If the backbone has no rotary embedding of that form.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        parts = rotary_parts(backbone)
        if parts is None:
            raise UserError(
                f"model.backbone: {type(backbone).__name__} is not laid out as needed (a decoder with `layers`, `norm` "
                "and one `rotary_emb` that keys can be rotated back by). "
                f"Allowed: {', '.join(FAMILIES)}. Fix: choose a backbone of one of these families."
            )
        self._parts, self.module = parts, parts.module
        self.tables = sorted(set(text_config(backbone).layer_types)) if parts.by_type else [""]
        self._layer_table: dict[int, str] = {}
        self._exact = self._in_float32(backbone)
        # Whoever casts buffers (``.to(bfloat16)``, sharding with mixed precision), angles are computed from float32.
        self._guard = self.module.register_forward_pre_hook(self._restore_before)

    def _in_float32(self, backbone: PreTrainedModel) -> dict[str, Tensor]:
        """The frequencies; computed anew if the backbone was cast before it came here."""
        buffers = dict(self.module.named_buffers(recurse=False))
        if any(b.is_floating_point() and b.dtype != torch.float32 for b in buffers.values()):
            fresh = type(self.module)(config=text_config(backbone))  # type: ignore[call-arg]
            buffers = dict(fresh.named_buffers(recurse=False))
        return {name: buffer.clone() for name, buffer in buffers.items()}

    def restore(self) -> None:
        """Put back frequencies that were cast: in bfloat16 they moved perplexity from 33 to 2,059 at late positions."""
        for name, buffer in list(self.module.named_buffers(recurse=False)):
            exact = self._exact.get(name)
            if exact is not None and buffer.dtype != exact.dtype:
                setattr(self.module, name, exact.to(buffer.device))

    def _restore_before(self, *_: object) -> None:  # a method, which can be pickled
        self.restore()

    def release(self) -> None:
        """Leave the backbone's module as it was."""
        self._guard.remove()

    def recognise(self, keys: Mapping[int, Tensor]) -> set[int]:
        """Find each layer's table from its keys (1, H, T, D) of one token repeated T times.

        Every position then has the same hidden state in every layer, so the same unrotated key: of all tables, a layer
        has the one whose turning back makes its keys equal.

        Returns:
            The layers for which a table fits.
        """
        for layer, rotated in keys.items():
            errors = {table: self._spread(rotated, table) for table in (UNTURNED, *self.tables)}
            best = min(errors, key=errors.__getitem__)
            if errors[best] < 0.1:  # rounding of bfloat16 makes 0.01, a wrong table about 1
                self._layer_table[layer] = best
        return self.recognised

    @property
    def recognised(self) -> set[int]:
        """Layers whose table is known."""
        return set(self._layer_table)

    def _spread(self, rotated: Tensor, table: str) -> float:
        """How unequal keys are after turning them back: mean over dimensions, each by its own size.

        By its own: a few large dimensions that hardly turn (Qwen2 has such biases) must not outweigh those that do.
        """
        positions = torch.arange(rotated.shape[2], device=rotated.device)[None]
        back = (rotated if table == UNTURNED else self._unturn(rotated, positions, table)).float()
        size = rotated.float().abs().amax(dim=2)
        spread = (back - back[:, :, :1]).abs().amax(dim=2)
        return float((spread / (size + 1e-3 * size.mean() + 1e-9)).mean())

    def table(self, layer: int) -> str:
        """Name of a layer's table of angles; layers of one name rotate alike."""
        return self._layer_table[layer]

    def rotate(self, keys: Tensor, positions: Tensor, layers: list[int], reach: int) -> Tensor:
        """Rotate keys (L, B, H, T, D) of ``layers`` to ``positions`` (B or 1, T), in float32; dtype as given.

        ``reach`` is the last position of the window that will read them: some tables (longrope, dynamic) depend on it.
        """
        return self._by_table(keys, layers, lambda k, table: self._turn(k, *self._angles(positions, table, reach)))

    def unrotate(self, keys: Tensor, positions: Tensor, layers: list[int]) -> Tensor:
        """Undo :meth:`rotate`."""
        return self._by_table(keys, layers, lambda k, table: self._unturn(k, positions, table))

    def at_distance(self, layer: int, distance: int, tokens: Tensor, reach: int) -> tuple[Tensor, Tensor] | None:
        """Angles (1, T, D) that turn rotated queries to where every key at position 0 is ``distance`` away.

        Keys at position 0 are unrotated ones, so what a bank stores is read as it lies. A query was turned by its
        position t; turning it on by the difference to ``distance`` is one more rotation, whose angles follow from those
        of both: cos(a - b) and sin(a - b). Each table carries its scale once (YaRN); of the product's two one goes to
        the key, which has none.

        Args:
            layer: Whose queries.
            distance: Of all of memory [tokens].
            tokens: (T,) positions of the queries.
            reach: The last of them, as for :meth:`rotate`; given, so that nobody waits for the device to say it.

        Returns:
            Cosines and sines for :meth:`turn_query`; None: a layer without positions.
        """
        table = self.table(layer)
        if table == UNTURNED:
            return None
        cos, sin = self._angles(tokens[None], table, reach)
        far_cos, far_sin = self._angles(torch.full_like(tokens[:1], distance)[None], table, reach)
        scale = self._parts.scale(table)
        return (far_cos * cos + far_sin * sin) / scale, (far_sin * cos - far_cos * sin) / scale

    def turn_query(self, query: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Turn queries (B, H, T, D) by angles, in float32; dtype as given."""
        return self._turn(query, *angles)

    def _by_table(self, keys: Tensor, layers: list[int], turn: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Turn layers that share a table in one go: they share positions, so layers stand in for heads."""
        used = [self.table(layer) for layer in layers]
        if len(set(used)) == 1:
            return self._folded(keys, used[0], turn)
        result = torch.empty_like(keys)
        for table in set(used):
            places = [i for i, name in enumerate(used) if name == table]
            result[places] = self._folded(keys[places], table, turn)
        return result

    @staticmethod
    def _folded(keys: Tensor, table: str, turn: Callable[[Tensor, str], Tensor]) -> Tensor:
        if table == UNTURNED:
            return keys
        count, rows, heads, tokens, size = keys.shape
        folded = keys.transpose(0, 1).reshape(rows, count * heads, tokens, size)
        return turn(folded, table).view(rows, count, heads, tokens, size).transpose(0, 1)

    def _angles(self, positions: Tensor, table: str, reach: int | None = None) -> tuple[Tensor, Tensor]:
        # The dtype of the first argument is the dtype of the tables: float32, whatever the model computes in.
        like = torch.empty(0, device=positions.device, dtype=torch.float32)
        asked = positions if reach is None else F.pad(positions, (0, 1), value=reach)
        cos, sin = self.module(like, asked, table) if table else self.module(like, asked)
        tokens = positions.shape[1]
        return cos[:, :tokens], sin[:, :tokens]

    def _unturn(self, keys: Tensor, positions: Tensor, table: str) -> Tensor:
        """Rotate by the opposite angle, and undo the table's scale (YaRN) twice over."""
        cos, sin = self._angles(positions, table)
        scale = self._parts.scale(table) ** 2
        return self._turn(keys, cos / scale, -sin / scale)

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = keys.float()
        no_query = wide[:, :0]  # the function turns queries too; there are none
        return self._parts.apply(no_query, wide, cos, sin)[1].to(keys.dtype)


def memory_positions(mask: Tensor, position: str) -> Tensor:
    """Positions of retrieved tokens (B, M), given which of them are real (``mask``, bool (B, M)).

    Local tokens keep the backbone's positions 0..T-1, so that an empty memory changes nothing at all. Rotary
    attention sees differences of positions only, so ``zero`` (paper, section 2: memory at 0, local at 1..T) is
    memory at -1 here, and ``sequential`` (memory at 0..M-1, local after it) ends at -1.
    """
    if position == "zero":
        return torch.full_like(mask, -1, dtype=torch.long)
    return -mask.long().flip(-1).cumsum(-1).flip(-1)
