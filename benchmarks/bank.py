"""What the memory bank costs, and how that grows with its size: one process, medians, ratios.

    python benchmarks/bank.py                 # the table, and the picture of cost against size
    pip install --no-deps memorizing-transformers-pytorch einops    # adds the row that compares with its KNNMemory

A "window" is what one training step stores: 512 tokens, four chunks of 128. Shapes: ``default`` is SmolLM2-135M with 19
stored layers of 3 x 64 in float32; ``one layer`` is one of them; ``paper`` is one layer of OpenLLaMA-3B, 32 x 100 in
bfloat16.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import matplotlib.pyplot as plt  # noqa: E402

from lightning_memlong import MemLong, MemoryBank  # noqa: E402

CHUNK, CHUNKS, EMBEDDING = 128, 4, 384
SHAPES: dict[str, tuple[int, int, int, torch.dtype]] = {
    "default": (19, 3, 64, torch.float32),
    "one layer": (1, 3, 64, torch.float32),
    "paper": (1, 32, 100, torch.bfloat16),
}
RESULTS = Path(__file__).parent / "results"


def median(function: Callable[[], Any], times: int) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


class Bench:
    """A bank of one row, and windows to put into it."""

    def __init__(self, shape: str, capacity: int, chunks: int = CHUNKS, **settings: Any) -> None:
        layers, heads, size, self.dtype = SHAPES[shape]
        torch.manual_seed(0)
        self.bank = MemoryBank(1, capacity, CHUNK, **settings)
        self.keys = torch.randn(layers, 1, heads, chunks * CHUNK, size).to(self.dtype)
        self.values = torch.randn_like(self.keys)
        self.lengths, self.place, self.chunks = torch.full((1, chunks), CHUNK), 0, chunks
        self.embeddings = F.normalize(torch.randn(4096, chunks, EMBEDDING), dim=-1)

    def insert(self) -> None:
        """Store a window."""
        positions = torch.arange(self.place, self.place + self.chunks * CHUNK, CHUNK)[None]
        embeddings = self.embeddings[self.place // CHUNK // self.chunks % 4096][None]
        self.bank.insert(self.keys, self.values, embeddings, self.lengths, positions)
        self.place += self.chunks * CHUNK

    def fill(self) -> "Bench":
        """Fill the bank, and once more up to the top, so that every page was touched."""
        for _ in range(2 * self.bank.slots // self.chunks):
            if self.bank.evictions and len(self.bank.entries(0)) + 80 * self.chunks > self.bank.slots:
                break
            self.insert()
        return self

    def top_up(self) -> "Bench":
        """Insert until nothing more fits."""
        while len(self.bank.entries(0)) + self.chunks <= self.bank.slots:
            self.insert()
        return self

    def insertion(self, times: int = 60) -> float:
        """Median seconds of storing a window where nothing has to go."""
        taken, before = [], self.bank.evictions
        while len(taken) < times:
            start = time.perf_counter()
            self.insert()
            passed = time.perf_counter() - start
            if self.bank.evictions == before:
                taken.append(passed)
            before = self.bank.evictions
        return statistics.median(taken)

    def eviction(self) -> tuple[float, float]:
        """Seconds of one eviction, and of the insertions it makes room for."""
        self.top_up()
        start = time.perf_counter()
        self.insert()
        evicting = time.perf_counter() - start
        room = (self.bank.slots - len(self.bank.entries(0))) // self.chunks
        plain = self.insertion(min(room, 60))
        return max(0.0, evicting - plain), room * plain

    def retrieval(self, top_k: int = 8) -> tuple[float, float]:
        """Seconds of search and gather, and of gathering alone."""
        query = F.normalize(torch.randn(1, EMBEDDING), dim=-1)
        _, entries = self.bank.search(query, top_k)

        def both() -> None:
            scores, found = self.bank.search(query, top_k)
            self.bank.gather(found, scores)

        return median(both, 40), median(lambda: self.bank.gather(entries), 40)

    def copying(self) -> float:
        """Seconds of copying a window's keys and values with torch, into one place after the other."""
        rooms = [torch.zeros(64, *t.shape, dtype=self.dtype) for t in (self.keys, self.values)]
        places = iter(range(10**9))

        def copy() -> None:
            place = next(places) % 64
            rooms[0][place].copy_(self.keys)
            rooms[1][place].copy_(self.values)

        return median(copy, 128)


class Concatenated:
    """A bank as the reference code has it: one tensor, concatenated anew at each insertion."""

    def __init__(self, window: Bench, tokens: int) -> None:
        self.window = window
        shape = (*window.keys.shape[:3], tokens, window.keys.shape[4])
        self.keys, self.values = (torch.zeros(shape, dtype=window.dtype) for _ in range(2))

    def insert(self) -> None:
        """Store a window; the oldest tokens go."""
        tokens = self.window.keys.shape[3]
        self.keys = torch.cat([self.keys[:, :, :, tokens:], self.window.keys], dim=3)
        self.values = torch.cat([self.values[:, :, :, tokens:], self.window.values], dim=3)


def knn_memory(bench: Bench) -> float | None:
    """Seconds in which KNNMemory stores a window of one layer and searches for each of its tokens; None: not there."""
    try:
        from memorizing_transformers_pytorch.knn_memory import KNNMemory
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        memory = KNNMemory(64, 16_384, 1, memmap_filename=f"{folder}/memory", multiprocessing=False)
        window = torch.stack([bench.keys[0, :, 0], bench.values[0, :, 0]], dim=2)  # (1, T, 2, 64): one head

        def work() -> None:
            memory.add(window)
            memory.search(bench.keys[0, :, 0], 32)

        for _ in range(16_384 // 512 - 12):
            memory.add(window)
        return median(work, 10)


def from_cold_file() -> float:
    """Milliseconds of gathering 8 chunks of a bank on disk of which nothing is in the machine's memory."""
    bench = Bench("default", 32_768, storage="disk").fill().top_up()
    storage = bench.bank.view(0)._store.storage
    assert storage is not None
    parts = [t.permute(2, 0, 1, 3, 4) for t in (storage.keys, storage.values)]  # as they lie
    pages, taken = ctypes.CDLL(None, use_errno=True), []
    for _ in range(5):
        for part in parts:
            size = ctypes.c_size_t(part.numel() * part.element_size() // 4096 * 4096)
            if pages.madvise(ctypes.c_void_p(-(-part.data_ptr() // 4096) * 4096), size, 21):  # MADV_PAGEOUT
                raise OSError(ctypes.get_errno(), "madvise")
        entries = torch.randperm(len(bench.bank.entries(0)))[:8].sort().values[None]
        start = time.perf_counter()
        found = bench.bank.gather(entries, count=False)
        assert found is not None and found.keys.shape[-2] == 8 * CHUNK  # read on another thread until now
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def long_document(tokens: int) -> float:
    """Tokens/s in the last tenth of a document against the first tenth after the bank is full.

    The model is a tiny random Llama, so that the bank's share of the time is far larger than in any real run.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=4, max_position_embeddings=4096, **sizes)
    model = MemLong(LlamaForCausalLM(config).eval(), memory_layer=1).eval()
    bank, ids = MemoryBank(1, 16_384, CHUNK), torch.randint(0, 512, (1, 512))
    embeddings = F.normalize(torch.randn(tokens // 512, CHUNKS, EMBEDDING), dim=-1)
    taken = []
    with torch.no_grad():
        for step in range(tokens // 512):
            start = time.perf_counter()
            scores, entries = bank.search(embeddings[step - 1, -1][None], 3)
            output = model(ids, memory=bank.gather(entries, scores))
            positions = torch.arange(step * 512, (step + 1) * 512, CHUNK)[None]
            bank.insert(output.keys, output.values, embeddings[step][None], torch.full((1, CHUNKS), CHUNK), positions)
            taken.append(time.perf_counter() - start)
    full, tenth = 16_384 // 512 + 1, tokens // 512 // 10
    first, last = (sum(taken[i : i + tenth]) for i in (full, len(taken) - tenth))
    return first / last


def table(tokens: int) -> None:
    """Print the table."""
    print("| what | goal | measured |\n|---|---|---|")
    small, large = (Bench("one layer", size, chunks=1).fill() for size in (4096, tokens))
    pairs = [(large.insertion(30), small.insertion(15)) for _ in range(7)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"| inserting a chunk into a bank of {tokens:,} tokens / of 4,096 | 1.2 | **{ratio:.2f}** |", flush=True)
    for name, chunks in (("default", 4), ("paper", 8)):
        bench = Bench(name, 32_768, chunks).fill()
        pairs = [(bench.insertion(25), bench.copying()) for _ in range(5)]
        ratio = statistics.median(a / b for a, b in pairs)
        what = f"inserting a window of {chunks} chunks ({name}), against copying the same bytes"
        print(f"| {what} | 2 | **{ratio:.2f}** |", flush=True)
    for bench, name in ((Bench("default", 16_384).fill(), "default, 16,384"), (large, f"one layer, {tokens:,}")):
        pairs = [bench.eviction() for _ in range(5)]
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"| an eviction, against the insertions it pays for ({name} tokens) | 0.5 | **{ratio:.2f}** |", flush=True
        )
    pairs = [large.top_up().retrieval() for _ in range(5)]
    ratio = statistics.median(a / b for a, b in pairs)
    what = f"search + gather of 8 of {len(large.bank.entries(0)):,} chunks, against gathering"
    print(f"| {what} | 3 | **{ratio:.2f}** |", flush=True)
    what = "gathering 8 chunks (default, 11 MB of each of keys and values) of a file that is not in memory [ms]"
    print(f"| {what} | | **{from_cold_file():.0f}** |", flush=True)
    ratio = statistics.median(long_document(262_144) for _ in range(3))
    print(
        f"| tokens/s, last tenth of 262,144 tokens / first tenth with a full bank | 0.97 | **{ratio:.3f}** |",
        flush=True,
    )
    bench = Bench("one layer", 16_384).fill()
    theirs = knn_memory(bench)
    if theirs is None:
        print("| KNNMemory of memorizing-transformers-pytorch, against ours | 10 | not installed |")
        return
    ours = bench.insertion(30) + bench.retrieval(3)[0]
    what = "a window stored and retrieved for: KNNMemory of memorizing-transformers-pytorch, against ours"
    print(f"| {what} | 10 | **{theirs / ours:.0f}** |", flush=True)


def curve(largest: int) -> None:
    """Draw cost against bank size."""
    sizes = [4096 * 4**i for i in range(10) if 4096 * 4**i <= largest]
    lines: dict[str, list[float]] = {}
    for size in sizes:
        bench = Bench("one layer", size).fill()
        evicting, paid = bench.eviction()
        both, gathering = bench.top_up().retrieval(min(8, bench.bank.slots // 4))
        whole = Concatenated(bench, size)
        costs = {
            "insert a window": bench.insertion(min(40, bench.bank.slots // CHUNKS // 3)),
            "its share of evictions": evicting / max(1, bench.bank.slots // CHUNKS // 2),
            "search 8 chunks": both - gathering,
            "gather 8 chunks": gathering,
            "concatenate the whole bank (reference code)": median(whole.insert, 5),
        }
        print(f"{size:>10,} " + "  ".join(f"{k}: {v * 1e3:.3f} ms" for k, v in costs.items()), file=sys.stderr)
        for name, value in costs.items():
            lines.setdefault(name, []).append(value * 1e3)
        del bench, whole
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, values in lines.items():
        axes.plot(sizes, values, marker="o", linestyle="--" if "reference" in name else "-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="bank size [tokens]", ylabel="time [ms]")
    axes.set_title("What a window of 512 tokens costs the bank (one stored layer, 3 heads of 64)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "bank.png", dpi=130)
    print(f"\nPicture: {RESULTS / 'bank.png'}")


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20, help="the large bank of the table [tokens]")
    parser.add_argument("--largest", type=int, default=1 << 22, help="right end of the picture [tokens]")
    args = parser.parse_args()
    table(args.tokens)
    curve(args.largest)


if __name__ == "__main__":
    main()
