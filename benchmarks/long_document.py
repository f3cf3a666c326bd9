"""A long document on one GPU: peak memory, and speed early and late, at the paper's size.

    python benchmarks/long_document.py                                    # OpenLLaMA-3B's shape, needs a GPU
    python benchmarks/long_document.py --tokens 1048576 --storage host    # K/V on the host, beside the GPU
    python benchmarks/long_document.py --shape tiny --tokens 20480        # anywhere, to see that it runs

Random weights: neither memory nor speed depends on their values. Each step is retrieval, forward pass, backward pass of
LoRA weights with gradient checkpointing, AdamW, insertion of the chunks; a bank holds the whole document.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.paired import now  # noqa: E402
from callbacks.throughput import peak_memory_gb  # noqa: E402
from lightning_memlong.bank import MemoryBank  # noqa: E402
from lightning_memlong.config import ModelConfig, TuningConfig  # noqa: E402
from lightning_memlong.memlong import MemLong  # noqa: E402

SHAPES = {  # hidden size, layers, heads, head size, inner size, vocabulary, memory layer, retrieval layers
    "openllama-3b": (3200, 26, 32, 100, 8640, 32000, 13, [13, 17, 21, 25]),
    "tiny": (128, 4, 4, 32, 256, 1000, 1, [1, 3]),
}
WINDOW, CHUNK, TOP_K, EMBEDDING = 1024, 128, 8, 1024


def build(shape: str, device: str) -> MemLong:
    """The paper's form: one stored layer, gates, LoRA, checkpointing; weights in bfloat16 on a GPU."""
    hidden, layers, heads, size, inner, vocabulary, memory_layer, retrieval_layers = SHAPES[shape]
    llama = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, head_dim=size,
                        intermediate_size=inner, vocab_size=vocabulary, max_position_embeddings=2048)  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    llama.dtype = dtype
    with torch.device(device):
        backbone = LlamaForCausalLM(llama).to(dtype)
    tuning = TuningConfig(mode="lora")
    config = ModelConfig(memory_layer, retrieval_layers, "single", "gated", "zero", gradient_checkpointing=True)
    model = MemLong(backbone, config, tuning=tuning)
    return model.to(device).train()


def read(model: MemLong, tokens: int, storage: str, device: str) -> list[float]:
    """Seconds of each step along a document of so many tokens."""
    vocabulary = model.backbone.config.vocab_size
    mixer = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, tokens, CHUNK, dtype=torch.bfloat16, storage=storage)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=5e-5)
    lengths = torch.full((1, WINDOW // CHUNK), CHUNK)
    seconds = []
    for start in range(0, tokens, WINDOW):
        ids = torch.randint(0, vocabulary, (1, WINDOW), generator=mixer).to(device)
        embeddings = F.normalize(torch.randn(1, WINDOW // CHUNK, EMBEDDING, generator=mixer), dim=-1)
        begin = now()
        memory = None
        if bank.insertions:
            scores, entries = bank.search(embeddings[:, -1], TOP_K)
            memory = bank.gather(entries, scores)
        output = model(ids, ids, memory=memory)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        positions = torch.arange(start, start + WINDOW, CHUNK)[None]
        bank.insert(output.keys, output.values, embeddings, lengths, positions)
        seconds.append(now() - begin)
        print(
            f"\r  {start + WINDOW:,} of {tokens:,} tokens, {WINDOW / seconds[-1]:,.0f} tokens/s",
            end="",
            file=sys.stderr,
        )
    print(file=sys.stderr)
    return seconds


def speed(seconds: list[float], token: int) -> float:
    """Tokens a second around a place in the document: the median of the 8 steps that end there."""
    last = max(1, token // WINDOW)
    return WINDOW / statistics.median(seconds[max(0, last - 8) : last])


def main() -> None:
    """Print a row of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="openllama-3b")
    parser.add_argument("--tokens", type=int, default=81920, help="length of the document [tokens]")
    parser.add_argument("--storage", choices=("device", "host", "disk"), default="device")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.shape != "tiny":
        parser.error("--shape openllama-3b needs a GPU; --shape tiny runs anywhere")
    tokens = args.tokens // WINDOW * WINDOW
    seconds = read(build(args.shape, device), tokens, args.storage, device)
    early, late = speed(seconds, 16384), speed(seconds, tokens)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, whole process"
    print(
        "| shape | tokens | K/V on | peak memory [GB] | tokens/s at 8k..16k | at the end | late / early | measured on |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {args.shape} | {tokens:,} | {args.storage} | {peak_memory_gb():.2f} | {early:,.0f} | {late:,.0f} | "
        f"**{late / early:.3f}** | {where} |"
    )


if __name__ == "__main__":
    main()
