"""Against the plain model with its full key/value cache: time to the first token, tokens/s, memory, from 1k to 32k.

    python benchmarks/generation.py ../shared/data/pg19/train/2701.txt         # 25 minutes on two cores
    python benchmarks/generation.py book.txt --lengths 1024 2048 --rounds 1    # anywhere

SmolLM2-135M reads so much of the file and writes 64 tokens. ``plain`` is transformers alone; ``memlong`` the default
model (each layer from 11 up stores and reads), ``memlong, single`` stores and reads layer 11 only. Both read windows of
2,048 tokens. Each measurement is a process of its own, turn about, so that peak memory is its own; medians of rounds.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

from benchmarks.reading import standard_library  # noqa: E402

WAYS = ("plain", "memlong", "memlong, single")
WRITTEN = 64
MEMORY = {"top_k": 3, "retriever": {"cache": False}}


def resident_gb() -> float:
    """Memory of this process that is in use now [GB]; of the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e9


class Peak:
    """The most memory in use while a block runs, beyond what was in use before [GB], looked at 100 times a second."""

    def __enter__(self) -> "Peak":
        self.before = self.most = resident_gb()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, resident_gb())

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    @property
    def gb(self) -> float:
        """What was taken."""
        return self.most - self.before


def measure(way: str, file: str, length: int, window: int) -> dict[str, float]:
    """Time to the first token [s], tokens/s after it, and memory [GB], in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_memlong import MemLong
    from lightning_memlong.backbone import load_tokenizer, resolve_backbone

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer("smollm2-135m")
    ids = tokenizer(Path(file).read_text(), add_special_tokens=False, verbose=False)["input_ids"][:length]
    prompt = tokenizer.decode(ids[-64:])
    first: list[float] = []
    if way == "plain":
        plain = AutoModelForCausalLM.from_pretrained(resolve_backbone("smollm2-135m"), dtype=torch.float32).to(device)

        def write() -> None:
            plain.generate(torch.tensor([ids], device=device), do_sample=False, streamer=Clock(first), **budget())

    else:
        layers = {"source": "single", "retrieval_layers": [11]} if way.endswith("single") else {}
        model = MemLong.from_pretrained("smollm2-135m", MEMORY, memory_layer=11, **layers).to(device)
        model.retrieval.retriever.encode(["so that it is loaded"])

        def write() -> None:
            bank = model.read(tokenizer.decode(ids[:-64]), window=window, progress=False)
            model.generate(prompt, bank, window=window, streamer=Clock(first), **budget())

    with Peak() as peak:
        begin = time.perf_counter()
        write()
        end = time.perf_counter()
    return {"first": first[1] - begin, "speed": (WRITTEN - 1) / (end - first[1]), "memory": peak.gb}


class Clock:
    """A streamer that notes when things come: first the prompt, then each token."""

    def __init__(self, times: list[float]) -> None:
        self._times = times

    def put(self, value: Any) -> None:
        """Note the time."""
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def budget() -> dict[str, int]:
    """How much is written."""
    return {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Three panels over length, a line a way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = {"first": "time to the first token [s]", "speed": "tokens/s after it", "memory": "memory taken [GB]"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for way in WAYS:
            mine = [r for r in rows if r["way"] == way]
            axes.plot([r["length"] for r in mine], [r[name] for r in mine], marker="o", label=way)
        axes.set_xscale("log", base=2)
        axes.set_xticks([r["length"] for r in rows if r["way"] == "plain"])
        axes.set_xticklabels([f"{r['length'] // 1024}k" for r in rows if r["way"] == "plain"])
        axes.set_yscale("log" if name != "speed" else "linear")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens read")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, print, and write a table and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="without it: sources of the standard library")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "generation"))
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)  # a measurement in a process of its own
    options = parser.parse_args()
    if options.file is None:
        with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as text:
            text.write("".join(Path(file).read_text() for file in standard_library()))
        options.file = text.name
    if options.one:
        print(json.dumps(measure(options.one, options.file, options.lengths[0], options.window)))
        return
    rows = []
    for length in options.lengths:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(options.rounds):
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                command = [sys.executable, __file__, options.file, "--one", way, "--lengths", str(length)]
                command += ["--window", str(options.window)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
        for way, each in found.items():
            middle = {name: statistics.median(m[name] for m in each) for name in each[0]}
            rows.append({"way": way, "length": length, **middle})
            told = f"first token {middle['first']:.2f} s, {middle['speed']:.1f} tokens/s, {middle['memory']:.2f} GB"
            print(f"{length:>6,} {way:<16} {told}", flush=True)
    out = Path(options.out)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
