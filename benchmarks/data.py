"""How fast batches arrive: from the token cache, and while streaming.

    python benchmarks/data.py [FILE_OR_FOLDER]

From the cache, against the time the default model trains on a batch. Streaming (reading, tokenising, cutting windows),
against calling the tokenizer on the same texts in a loop. One process, both sides of a ratio turn about, medians.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

from benchmarks.training import Training  # noqa: E402
from datamodules import LocalText  # noqa: E402
from lightning_memlong.backbone import load_tokenizer  # noqa: E402


def train_seconds(steps: int) -> float:
    """Median time of a training step of the default configuration."""
    training = Training([])
    batches = itertools.islice(training.data.train_dataloader(), steps + 2)
    return statistics.median([training.step(batch) for batch in batches][2:])


def data(path: str | None, **settings: Any) -> LocalText:
    """The default DataModule."""
    module = LocalText(path=path, split="hash", min_document_tokens=512, **settings)
    module.setup("fit")
    return module


def batch_seconds(path: str | None, workers: int) -> float:
    """Time of a batch from the cache, over an epoch."""
    stream = data(path, num_workers=workers).train_dataloader()
    start, count = time.perf_counter(), 0
    for _ in stream:
        count += 1
    return (time.perf_counter() - start) / count


def train_texts(path: str | None) -> list[str]:
    """The documents that the streams of this benchmark read."""
    corpus = data(path, cache=False).train_dataloader().corpus  # type: ignore[union-attr]
    return [document.text for index in range(len(corpus.shards)) for document in corpus.read(index, 0)]


def loop(texts: list[str]) -> float:
    """Time of the tokenizer alone."""
    tokenizer = load_tokenizer("smollm2-135m")
    start = time.perf_counter()
    for text in texts:
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return time.perf_counter() - start


def streaming(path: str | None, workers: int) -> float:
    """Time of an epoch that is tokenised on the way."""
    stream = data(path, cache=False, num_workers=workers).train_dataloader()
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="text; default: the sources of Python's standard library")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side of a streaming ratio")
    parser.add_argument("--steps", type=int, default=7, help="training steps")
    args = parser.parse_args()

    step = train_seconds(args.steps)
    print("\n| from the cache | a batch [ms] | a training step [ms] | how many times faster |\n|---|---|---|---|")
    for workers in (0, 2):
        batch = statistics.median(batch_seconds(args.path, workers) for _ in range(3))
        print(f"| {workers} workers | {batch * 1e3:.3f} | {step * 1e3:.0f} | **{step / batch:,.0f}** |", flush=True)

    texts = train_texts(args.path)
    print(f"\n{len(texts)} documents, {sum(map(len, texts)):,} characters\n")
    print("| streaming | tokenizer in a loop [s] | stream [s] | ratio |\n|---|---|---|---|")
    for workers in (0, 1, 2):
        pairs = [(loop(texts), streaming(args.path, workers)) for _ in range(args.rounds)]
        alone, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"| {workers} workers | {alone:.2f} | {ours:.2f} | **{ratio:.2f}** |", flush=True)


if __name__ == "__main__":
    main()
