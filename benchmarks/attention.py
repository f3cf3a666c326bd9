"""A retrieval layer against a plain layer over as many keys; kernels side by side; what a head size of 100 costs.

    python benchmarks/attention.py          # on the GPU if there is one, where FlexAttention has rows too

A window of 1,024 tokens, 8 chunks of 128 retrieved. The plain layer has those 1,024 tokens in its key/value cache: the
same queries see the same number of keys.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.paired import paired  # noqa: E402
from lightning_memlong.attention import retrieval_causal_attention  # noqa: E402
from lightning_memlong.model import ForwardContext
from lightning_memlong.model.attention_interface import register_attention  # noqa: E402

TOKENS = MEMORY = 1024
SHAPES = {  # name -> hidden size, heads, key/value heads, head size, inner size
    "SmolLM2-135M": (576, 9, 3, 64, 1536),
    "Llama-3.2-1B": (2048, 32, 8, 64, 8192),
    "OpenLLaMA-3B": (3200, 32, 32, 100, 8640),
}


def layers(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """One decoder layer, with memory and with a cache of as many tokens."""
    hidden, heads, kv_heads, size, inner = shape
    config = LlamaConfig(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size,
                         intermediate_size=inner, num_hidden_layers=1, vocab_size=128,
                         max_position_embeddings=4096)  # fmt: skip
    models = [LlamaForCausalLM(config).to(device, dtype).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0].set_attn_implementation(register_attention())
    states = torch.randn(1, TOKENS, hidden, device=device, dtype=dtype)
    keys, values = (torch.randn(1, kv_heads, MEMORY, size, device=device, dtype=dtype) for _ in range(2))

    def tables(model: Any, start: int) -> tuple[Tensor, Tensor]:
        return model.model.rotary_emb(states, torch.arange(start, start + TOKENS, device=device)[None])

    def with_memory() -> Tensor:
        carried = ForwardContext(memory_kv={0: (keys, values)}, capture_layers=frozenset({0}))
        return models[0].model.layers[0](states, position_embeddings=tables(models[0], 0), memory=carried)

    seen = torch.ones(TOKENS, MEMORY + TOKENS, dtype=torch.bool, device=device).tril(MEMORY)[None, None]

    def with_cache() -> Tensor:
        cache = DynamicCache(config=config)
        cache.update(keys, values, 0)
        embeddings = tables(models[1], MEMORY)
        return models[1].model.layers[0](
            states, position_embeddings=embeddings, attention_mask=seen, past_key_values=cache, use_cache=True
        )

    return {"memory": with_memory, "cache": with_cache}


def kernels(heads: int, kv_heads: int, size: int, device: str, dtype: torch.dtype, train: bool) -> dict[str, Any]:
    """Joint attention by each backend."""
    query = torch.randn(1, heads, TOKENS, size, device=device, dtype=dtype, requires_grad=train)
    local = [torch.randn(1, kv_heads, TOKENS, size, device=device, dtype=dtype, requires_grad=train) for _ in range(2)]
    memory = [torch.randn(1, kv_heads, MEMORY, size, device=device, dtype=dtype) for _ in range(2)]

    def run(backend: str) -> Callable[[], None]:
        def call() -> None:
            output = retrieval_causal_attention(query, *local, *memory, backend=backend)
            if train:
                output.sum().backward()

        return call

    backends = ("auto", "two_part", "flex", "sdpa") if device == "cuda" else ("auto", "sdpa")
    return {backend: run(backend) for backend in backends}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each")
    rounds = parser.parse_args().rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"{device}, {dtype}\n\n| layer of | retrieval layer / plain layer | [ms] | plain [ms] |\n|---|---|---|---|")
    with torch.no_grad():
        for name, shape in SHAPES.items():
            seconds, ratios = paired(layers(shape, device, dtype), rounds)
            with_memory, with_cache = (seconds[way] * 1e3 for way in ("memory", "cache"))
            print(f"| {name} | **{ratios['memory']:.3f}** | {with_memory:.1f} | {with_cache:.1f} |", flush=True)
    print("\n| joint attention, 8 heads | pass | backend | by sdpa | [ms] |\n|---|---|---|---|---|")
    for size in (64, 96, 100, 128):
        for train in (False, True):
            seconds, ratios = paired(kernels(8, 8, size, device, dtype, train), rounds)
            for backend, value in seconds.items():
                what = "forward and backward" if train else "forward"
                print(
                    f"| head size {size} | {what} | {backend} | {ratios[backend]:.3f} | {value * 1e3:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
