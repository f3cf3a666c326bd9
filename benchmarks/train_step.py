"""A training step with memory on against the same step with memory off: one process, paired, medians.

    python benchmarks/train_step.py

Everything is included: retriever, search, gather, attention, insertion, backward pass and optimiser. Each pair runs
both steps on the same window, in alternating order; the ratio is the median over pairs.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

from benchmarks.paired import now  # noqa: E402
from benchmarks.training import Training  # noqa: E402
from callbacks.throughput import peak_memory_gb  # noqa: E402
from lightning_memlong.bank import memory_bank as bank_module  # noqa: E402

PARTS = ("retriever", "search", "gather", "insert")


class Clock:
    """Adds up seconds by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += now() - start

        return timed


@contextmanager
def timed_parts(callback: Any, clock: Clock) -> Iterator[None]:
    """Time the callback's retriever and its bank's methods for a while."""
    kept = {name: getattr(bank_module.MemoryBank, name) for name in ("search", "gather", "insert")}
    encode = callback._retriever.encode
    for name, method in kept.items():
        setattr(bank_module.MemoryBank, name, clock.wrap(name, method))
    callback._retriever.encode = clock.wrap("retriever", encode)
    try:
        yield
    finally:
        callback._retriever.encode = encode
        for name, method in kept.items():
            setattr(bank_module.MemoryBank, name, method)


def measure(options: list[str], pairs: int) -> dict[str, float]:
    """Ratio and shares at one configuration."""
    training = Training(options)
    callback, step = training.callback, training.step
    batches = iter(training.data.train_dataloader())
    clock = Clock()

    def full(batch: dict[str, Any]) -> bool:
        bank = callback.banks["train"]
        held = bank.entries(0)
        return len(held) >= callback.config.top_k and not bool(batch["document_start"].any())

    on: list[float] = []
    off: list[float] = []
    warm = 0
    with timed_parts(callback, clock):
        for batch in batches:
            if "train" not in callback.banks or not full(batch) or warm < 2:  # fill the bank, warm caches
                warm += step(batch, True) > 0 and full(batch)
                step(batch, False)
                clock.seconds = dict.fromkeys(PARTS, 0.0) if not on else clock.seconds
                continue
            order = (True, False) if len(on) % 2 else (False, True)
            times = {memory: step(batch, memory) for memory in order}
            on.append(times[True])
            off.append(times[False])
            print(f"\r  pair {len(on)}/{pairs}", end="", file=sys.stderr, flush=True)
            if len(on) == pairs:
                break
    print(file=sys.stderr)
    total_on, total_off = statistics.median(on), statistics.median(off)
    shares = {part: clock.seconds[part] / pairs / total_on for part in PARTS}
    rest = (total_on - total_off) / total_on - sum(shares.values())
    result = {"on_s": total_on, "off_s": total_off, **shares, "attention": rest}
    result["ratio"] = statistics.median(a / b for a, b in zip(on, off, strict=True))
    result["peak_gb"] = peak_memory_gb()
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps measured at each window")
    parser.add_argument("options", nargs="*", help="further options of train.py, after --")
    args = parser.parse_args()
    print("| W | on / off | on [s] | off [s] | retriever | search | gather | insert | attention and rest | peak [GB] |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for window in (512, 1024):
        r = measure(["--data.window", str(window), *args.options], args.pairs)
        parts = " | ".join(f"{r[k]:.1%}" for k in (*PARTS, "attention"))
        print(
            f"| {window} | **{r['ratio']:.3f}** | {r['on_s']:.2f} | {r['off_s']:.2f} | {parts} | {r['peak_gb']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
