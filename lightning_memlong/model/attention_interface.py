"""How retrieved memory reaches attention: an argument of the forward pass, and a function known to transformers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_memlong.attention.functional import Memo, Memory, Scores, attend_with_memory, local_attention
from lightning_memlong.attention.kernels import compute_dtype

ATTENTION_NAME = "memlong"


class Enough(Exception):
    """Ends a forward pass early: all that was asked for has been captured."""


class OnDemand(Mapping[int, tuple[Tensor, Tensor]]):
    """What retrieval layers read, got ready when the first of them asks: until then the layers below are computed.

    Args:
        layers: The layers that will find something.
        prepare: Gives it, for all of them.
    """

    def __init__(self, layers: Sequence[int], prepare: Callable[[], Mapping[int, tuple[Tensor, Tensor]]]) -> None:
        self._layers, self._prepare = layers, prepare

    @cached_property
    def _ready(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        return self._prepare()

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        return self._ready[layer]

    def __contains__(self, layer: object) -> bool:
        """Whether a layer will find something; nothing is got ready for the answer."""
        return layer in self._layers

    def __iter__(self) -> Iterator[int]:
        """The layers."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self._layers)


@dataclass
class CarriedMemory:
    """What one forward pass carries, as a keyword argument, down to every attention layer.

    It is an argument and not state on a module, so gradient checkpointing re-runs a layer with the same memory.
    """

    memory: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> keys, already at their positions, and values, (B * G, H_kv, M, D); retrieval layers have an entry."""
    mask: Tensor | None = None
    """(B * G, M) bool; None where every retrieved token is real."""
    gates: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """Layer, as a string -> (H,), for fusion ``gated``."""
    prefix: int = 0
    """Tokens before the window that do not read memory."""
    backend: str = "auto"
    """Which attention kernels, see :func:`lightning_memlong.attention.functional.choose_kernel`."""
    capture: frozenset[int] = frozenset()
    """Layers whose local keys and values are wanted."""
    last: int | None = None
    """Layer after whose keys and values nothing is wanted any more: there the pass ends; None: it runs to the end."""
    captured: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> rotated keys and values (B, H_kv, T, D), filled during the pass, detached."""
    mass: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> share of attention on memory (B, H), mean over tokens, filled during the pass where it is known."""
    hidden: Tensor | None = None
    """(B, T, E), hidden states that leave the memory layer, filled during the pass, detached."""
    memo: Memo = field(default_factory=Memo)


def keep_hidden(layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
    """A forward hook that leaves a layer's hidden states with what the pass carries."""
    if (carried := kwargs.get("memory")) is not None:
        carried.hidden = (output[0] if isinstance(output, tuple) else output).detach()


def memory_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    memory: CarriedMemory | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls in every layer; plain attention where there is no memory to read.

    Raises:
        Enough: In the layer where the pass is to end.
        ValueError: For a backbone that adds something to the softmax that plain attention does not have.
    """
    beyond = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if beyond:
        raise ValueError(f"attention with {', '.join(beyond)} cannot be joined with memory")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    memory = memory or CarriedMemory()
    if layer in memory.capture:
        memory.captured[layer] = (key.detach(), value.detach())
    if layer == memory.last:
        raise Enough
    if layer not in memory.memory and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    # Under autocast, rotated queries may be float32 beside bfloat16 values.
    query, key, value = (t.to(compute_dtype(t)) for t in (query, key, value))
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, dropout)
    if layer not in memory.memory:
        output = local_attention(query, key, value, attention_mask, scores, memory.backend, memory.memo)
        return output.transpose(1, 2).contiguous(), None
    keys, values = memory.memory[layer]
    retrieved = Memory(keys, values, memory.mask, memory.prefix, memory.gates.get(str(layer)))
    output, mass = attend_with_memory(query, key, value, retrieved, attention_mask, scores, memory.backend, memory.memo)
    if mass is not None:
        memory.mass[layer] = mass.mean(-1)
    return output.transpose(1, 2).contiguous(), None


def register_attention() -> str:
    """Register the function with transformers (idempotent) and return its name."""
    AttentionInterface.register(ATTENTION_NAME, memory_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    return ATTENTION_NAME
