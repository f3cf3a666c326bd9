"""A training step with memory on against off at the shapes of real models, and how often a step waits for the GPU.

    python benchmarks/step_price.py                  # needs a GPU
    python benchmarks/step_price.py --shape tiny     # anywhere, to see that it runs

Random weights, bfloat16 on a GPU, LoRA, gradient checkpointing; joint softmax, each retrieval layer reads its own keys and
values. Both steps run on the same window, turn about; the ratio is the median over pairs. Embeddings are given: the
encoder is not part of it. Blocking synchronisations are those PyTorch warns of (``torch.cuda.set_sync_debug_mode``).
"""

import argparse
import statistics
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.paired import now  # noqa: E402
from lightning_memlong.bank import MemoryBank, Retrieved  # noqa: E402
from lightning_memlong.config import TuningConfig  # noqa: E402
from lightning_memlong.memlong import MemLong  # noqa: E402

SHAPES = {  # hidden size, layers, heads, key/value heads, head size, inner size, vocabulary
    "SmolLM2-135M": (576, 30, 9, 3, 64, 1536, 49152),
    "Llama-3.2-1B": (2048, 16, 32, 8, 64, 8192, 128256),
    "OpenLLaMA-3B": (3200, 26, 32, 32, 100, 8640, 32000),
    "tiny": (128, 4, 4, 2, 32, 256, 1000),
}
CHUNK, EMBEDDING, CHUNKS_HELD = 128, 384, 256


class Step:
    """A model, a full bank and an optimiser.

    Args:
        shape: Name of it.
        window: Tokens of a step.
        top_k: Chunks retrieved.
        device: Where.
    """

    def __init__(self, shape: str, window: int, top_k: int, device: str) -> None:
        hidden, layers, heads, kv_heads, size, inner, self.vocabulary = SHAPES[shape]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        config = LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_dim=size, intermediate_size=inner, vocab_size=self.vocabulary, max_position_embeddings=8192,
            tie_word_embeddings=True, dtype=dtype,
        )  # fmt: skip
        with torch.device(device):
            backbone = LlamaForCausalLM(config).to(dtype)
        tuning = TuningConfig(mode="lora")
        self.model = MemLong(backbone, tuning=tuning, gradient_checkpointing=True).to(device).train()
        self.window, self.top_k, self.device = window, top_k, device
        self.optimizer = torch.optim.AdamW(self.model.trainable().values(), lr=5e-5)
        self.bank = MemoryBank(1, CHUNKS_HELD * CHUNK, CHUNK)
        self.mixer = torch.Generator().manual_seed(0)
        self.end = 0
        with torch.no_grad():
            while len(self.bank.entries(0)) < CHUNKS_HELD // 2:
                self.insert(self.model.capture(self.ids()))

    def ids(self) -> Tensor:
        """A window (1, W)."""
        return torch.randint(0, self.vocabulary, (1, self.window), generator=self.mixer).to(self.device)

    def insert(self, captured: dict[str, Tensor]) -> None:
        """Store a window."""
        count = self.window // CHUNK
        embeddings = F.normalize(torch.randn(1, count, EMBEDDING, generator=self.mixer), dim=-1)
        positions = self.end + torch.arange(0, self.window, CHUNK)[None]
        lengths = torch.full((1, count), CHUNK)
        self.bank.insert(captured["keys"], captured["values"], embeddings, lengths, positions)
        self.end += self.window

    def retrieve(self) -> Retrieved | None:
        """Search and gather."""
        query = F.normalize(torch.randn(1, EMBEDDING, generator=self.mixer), dim=-1)
        scores, entries = self.bank.search(query, self.top_k)
        return self.bank.gather(entries, scores)

    def run(self, ids: Tensor, memory: bool) -> dict[str, float]:
        """Milliseconds of the parts of a step."""
        marks = [now()]
        retrieved = self.retrieve() if memory else None
        marks.append(now())
        output = self.model(ids, ids, memory=retrieved)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(now())
        if memory:
            self.insert({"keys": output.keys, "values": output.values})
        marks.append(now())
        names = ("retrieve", "network", "insert")
        parts = {name: 1e3 * (b - a) for name, a, b in zip(names, marks, marks[1:], strict=False)}
        return {**parts, "step": 1e3 * (marks[-1] - marks[0])}


def waits(step: Step) -> Counter[str]:
    """Where a step with memory waits for the device, and how often; nothing on the CPU."""
    if step.device != "cuda":
        return Counter()
    ids = step.ids()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            retrieved = step.retrieve()
            output = step.model(ids, ids, memory=retrieved)
            output.loss.backward()
            step.optimizer.step()
            step.insert({"keys": output.keys, "values": output.values})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    step.optimizer.zero_grad()
    return Counter(f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in told
                   if "synchroniz" in str(w.message).lower())  # fmt: skip


def main() -> None:
    """Print a table as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="one of them; all but tiny unless said")
    parser.add_argument("--pairs", type=int, default=8, help="steps of each kind")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [args.shape] if args.shape else [name for name in SHAPES if name != "tiny"]
    if device == "cpu" and shapes != ["tiny"]:
        parser.error("these shapes need a GPU; --shape tiny runs anywhere")
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU")
    print("| shape | window | top-k | on / off | on [ms] | off [ms] | retrieve | network | insert | waits |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        for window in (1024, 2048):
            for top_k in (8, 32):
                step = Step(shape, window, top_k, device)
                found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
                for number in range(args.pairs + 1):
                    ids = step.ids()
                    for memory in (True, False) if number % 2 else (False, True):
                        parts = step.run(ids, memory)
                        if number:  # the first pair warms up
                            found[memory].append(parts)
                pairs = zip(found[True], found[False], strict=True)
                ratio = statistics.median(on["step"] / off["step"] for on, off in pairs)
                on = {name: statistics.median(p[name] for p in found[True]) for name in found[True][0]}
                off = statistics.median(p["step"] for p in found[False])
                where = waits(step)
                print(
                    f"| {shape} | {window:,} | {top_k} | **{ratio:.3f}** | {on['step']:.1f} | {off:.1f} | "
                    f"{on['retrieve']:.1f} | {on['network']:.1f} | {on['insert']:.1f} | {sum(where.values())} |",
                    flush=True,
                )
                del step
        for place, count in where.most_common(8):
            print(f"    waits {count} x {place}", flush=True)


if __name__ == "__main__":
    main()
