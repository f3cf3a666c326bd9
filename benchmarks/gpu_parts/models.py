"""Models of real shapes with random weights: what they cost does not depend on the values."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, XLMRobertaConfig, XLMRobertaModel

from benchmarks.gpu_parts.context import Context
from lightning_memlong.config import TuningConfig
from lightning_memlong.memlong import MemLong
from lightning_memlong.retrieval import Retriever


@dataclass(frozen=True)
class Shape:
    """A decoder, and the form of memory it is given."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    size: int
    inner: int
    vocabulary: int
    memory: dict[str, Any]
    """Arguments of :class:`MemLong`."""
    encoder: str


def paper(layer: int, readers: list[int]) -> dict[str, Any]:
    """The paper's form: one stored layer, gates, LoRA, checkpointing."""
    form = {"source": "single", "fusion": "gated", "position": "zero", "tuning": TuningConfig(mode="lora")}
    return {"memory_layer": layer, "retrieval_layers": readers, "gradient_checkpointing": True, **form}


SMOLLM2 = Shape("SmolLM2-135M", 576, 30, 9, 3, 64, 1536, 49152, {"memory_layer": 11}, "MiniLM")
LLAMA = Shape("Llama-3.2-1B", 2048, 16, 32, 8, 64, 8192, 128256, {"memory_layer": 0.5}, "MiniLM")
OPENLLAMA = Shape("OpenLLaMA-3B", 3200, 26, 32, 32, 100, 8640, 32000, paper(13, [13, 17, 21, 25]), "bge-m3")
TINY = Shape("tiny", 64, 4, 4, 2, 16, 128, 1000, {"memory_layer": 1}, "tiny")
TINY_PAPER = Shape("tiny, paper's form", 64, 4, 4, 4, 20, 128, 1000, paper(1, [1, 3]), "tiny")

ENCODERS = {  # name -> architecture; hidden size, layers, heads, inner size, vocabulary
    "bge-m3": (XLMRobertaModel, XLMRobertaConfig, (1024, 24, 16, 4096, 250002)),
    "MiniLM": (BertModel, BertConfig, (384, 6, 12, 1536, 30522)),
    "tiny": (BertModel, BertConfig, (64, 2, 2, 128, 1200)),
}


def decoder(shape: Shape, context: Context, positions: int = 4096) -> LlamaForCausalLM:
    """A Llama of that shape, weights in what the card computes in."""
    config = LlamaConfig(hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
                         num_key_value_heads=shape.kv_heads, head_dim=shape.size, intermediate_size=shape.inner,
                         vocab_size=shape.vocabulary, max_position_embeddings=positions,
                         bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
    torch.manual_seed(context.seed)
    with torch.device(context.device):
        return LlamaForCausalLM(config).to(context.dtype)


class Encoder(Retriever):
    """A text encoder of a real one's shape: as many pieces of text, as long, through as many layers.

    Args:
        name: Whose shape.
        context: Where it runs, in bfloat16 on a card.
    """

    def __init__(self, name: str, context: Context) -> None:
        architecture, configuration, sizes = ENCODERS[name]
        hidden, layers, heads, inner, vocabulary = sizes
        config = configuration(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                               intermediate_size=inner, vocab_size=vocabulary,
                               max_position_embeddings=1026)  # fmt: skip
        with torch.device(context.device):
            model = architecture(config, add_pooling_layer=False).to(context.dtype)
        self._model, self.size, self._vocabulary = model.requires_grad_(False).eval(), hidden, vocabulary

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Unit vectors (n, size); 32 texts at a time, a token a word with one before and one after, as encoders do."""
        device, found = next(self._model.parameters()).device, []
        for start in range(0, len(texts), 32):
            rows = [
                [0, *(5 + int(w) % (self._vocabulary - 5) for w in t.split()), 2] for t in texts[start : start + 32]
            ]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
            states = self._model(ids.to(device), attention_mask=(ids != 1).to(device)).last_hidden_state
            found.append(F.normalize(states[:, 0].float(), dim=1).cpu())
        return torch.cat(found)


class Numbers:
    """A tokenizer without a vocabulary: token 17 is the word 17."""

    pad_token_id = bos_token_id = eos_token_id = 0
    chat_template = None
    all_special_ids = (0,)

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, list[Any]]:
        """Words to tokens."""
        if isinstance(text, list):
            return {"input_ids": [self(each)["input_ids"] for each in text]}
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, **_: Any) -> str:
        """Tokens to words."""
        return " ".join(map(str, torch.as_tensor(ids).tolist()))

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        """Of several texts."""
        return [self.decode(row) for row in rows]


def with_memory(shape: Shape, context: Context, positions: int = 4096) -> MemLong:
    """A model with that shape's form of memory, on the device."""
    return MemLong(decoder(shape, context, positions), **shape.memory).to(context.device)
