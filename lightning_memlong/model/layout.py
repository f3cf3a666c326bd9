"""Which layers store and read memory, and how."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryLayout:
    """Which layers store and read memory, and how."""

    memory_layer: int
    retrieval_layers: list[int]
    source: str
    fusion: str
    position: str
    attention: str
    memory_distance: int
    """Of all of memory but what is near, for position ``fixed`` [tokens]."""
    memory_near: int
    """How far before the window a chunk may begin to stand where it stood, for position ``fixed`` [tokens]."""
    memory_bias: bool

    @property
    def stored_layers(self) -> list[int]:
        """Layers whose K/V go into the bank, in the order of the bank's layer axis."""
        return [self.memory_layer] if self.source == "single" else self.retrieval_layers
