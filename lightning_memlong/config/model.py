"""Settings of the network: which layers store and read memory, how, and what of them is tuned."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_memlong.config.checks import require, require_choice, require_types

TuningMode = Literal["full", "lora", "gates_only", "none"]
Source = Literal["single", "per_layer"]
Fusion = Literal["joint", "gated"]
Position = Literal["fixed", "sequential", "zero"]
AttentionBackend = Literal["auto", "sdpa", "flex", "two_part"]
SOURCES: tuple[str, ...] = get_args(Source)
LayerIndex = int | float
"""A layer: its index from 0, or a fraction of the depth from 0.0 up to but not including 1.0."""
DEFAULT_MEMORY_LAYER = 0.375
"""Where memory is kept unless said otherwise: layer 11 of the default backbone's 30, a little below the middle."""


@dataclass
class TuningConfig:
    """Which weights above the memory layer are trained (paper, section 3)."""

    mode: TuningMode = "full"
    """full: every weight of the layers above the memory layer; lora: low-rank adapters on them (the paper);
    gates_only: nothing but the gates of fusion 'gated', or the biases of 'joint'; none: nothing (evaluation)."""
    norms: bool = True
    """Train the norms of the tuned layers and the final norm as well; only for full and lora."""
    head: bool = False
    """Train the output head as well; only for full and lora. A head that shares its weights with the frozen embeddings
    gets weights of its own."""
    lora_rank: int = 64
    """Rank of the adapters. Reference recipe: 64."""
    lora_alpha: float = 8.0
    """Scale of the adapters. Reference recipe: 8."""
    lora_dropout: float = 0.05
    """Dropout on the adapters' input [probability]. Reference recipe: 0.05."""
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Names of the linear layers that get adapters. Paper, section 3: q, k, v and o projections."""

    def __post_init__(self) -> None:
        """Check each value."""
        require_types(self, "model.tuning")
        require_choice("model.tuning.mode", self.mode, TuningMode)
        require(self.lora_rank >= 1, "model.tuning.lora_rank", self.lora_rank, "1 or more", "raise it")
        ok, allowed = 0 <= self.lora_dropout < 1, "from 0 up to but not including 1"
        require(ok, "model.tuning.lora_dropout", self.lora_dropout, allowed, "use 0.05")


@dataclass
class ModelConfig:
    """What the network is: which layers store and read memory, and how (the ``model`` group's settings)."""

    memory_layer: LayerIndex = DEFAULT_MEMORY_LAYER
    """Layer whose keys and values are stored [index from 0, or fraction of the depth: 0.5]; it and all below are
    frozen. Paper, section 3: 13 of 26."""
    retrieval_layers: list[LayerIndex] | int | None = None
    """Layers that attend to memory [indices from 0, or fractions]; a number: so many, which memory_weights names; null:
    memory_layer and all above, without sliding-window layers if there are others. Paper, section 3: 13, 17, 21, 25."""
    source: str = "per_layer"
    """per_layer: each retrieval layer stores and reads its own keys and values; single: those of the memory layer are
    read by all (the paper)."""
    fusion: str = "joint"
    """joint: one softmax over memory and window; gated: two, with a zero-initialised gate a head (paper, section 2)."""
    position: str = "fixed"
    """fixed: retrieved tokens stand at one distance from every query, so that many chunks need no more positions than
    few, but those that lie right before the window (memory_near) where they lie; sequential: all at running positions;
    zero: all right before the window (the paper)."""
    memory_distance: int | None = None
    """That distance, for position fixed [tokens]; null: 2,048, or what the backbone was trained for if that is less."""
    memory_near: int = 1024
    """For position fixed: chunks that begin within so many tokens before the window stand where they lie, and only
    others at the one distance [tokens]; 0: all do."""
    memory_reference: int | None = 4096
    """For position fixed and fusion joint: tokens at the one distance weigh, all together, as if they were so many,
    however many they are [tokens]. Few that a window longer than 1,024 tokens retrieved for itself, not for a question,
    are raised less: at 2,048 to a quarter of it. null: they weigh as many as they are."""
    memory_bias: bool = True
    """Learn one number for each retrieval layer and head, added to its scores in memory (not to what is near), for
    fusion joint: 0 changes nothing, with less a head reads less. Learned in every tuning mode, alone in gates_only."""
    memory_scale: bool = True
    """Learn one more for each: its scores in memory are multiplied by e to it, for position fixed. 0 changes nothing,
    with more a head reads fewer tokens, more sharply."""
    memory_weights: str | None = "auto"
    """A file of these numbers (conf/recipes/calibrate.yaml); auto: those of the backbone; null: begin with 0."""
    gradient_checkpointing: bool = field(default=False, metadata={"recipe": True})
    """Recompute layers in the backward pass instead of keeping their activations."""
    compile: str | None = field(default=None, metadata={"recipe": True})
    """Compile the backbone's layers by torch.compile, whose backend this names: inductor. What stands between their
    attention and memory stays as it is, so the same code serves every bank; the first steps take a minute. null: no."""
    attention: str = "auto"
    """Attention kernels. auto: the device's fused kernels in two parts, on CUDA if a check on the card finds them
    right, else one masked call; FlexAttention on CUDA where scores are soft-capped or retrieval is by chunk. sdpa: one
    masked call; flex: FlexAttention (CUDA); two_part: two parts, unchecked."""

    def __post_init__(self) -> None:
        """Check each value."""
        require_types(self, "model")
        for name, choices in (("source", Source), ("fusion", Fusion), ("position", Position)):
            require_choice(f"model.{name}", getattr(self, name), choices)
        ok = self.memory_distance is None or self.memory_distance >= 1
        require(ok, "model.memory_distance", self.memory_distance, "null, or 1 or more tokens", "leave it out")
        ok = self.memory_reference is None or self.memory_reference >= 1
        require(ok, "model.memory_reference", self.memory_reference, "null, or 1 or more tokens", "leave it out")
        require(self.memory_near >= 0, "model.memory_near", self.memory_near, "0 or more tokens", "leave it out")
        require_choice("model.attention", self.attention, AttentionBackend)
