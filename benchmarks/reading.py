"""Reading a million tokens and writing about them: speed early and late, layers left out, cost of a written token.

    python benchmarks/reading.py ../shared/data/pg19/*/*.txt                  # 1,048,576 tokens of books: 15 minutes
    python benchmarks/reading.py book.txt --tokens 65536                      # anywhere

The model is SmolLM2-135M. Reading: the paper's single stored layer, so that the layers above it are not computed; the
same layer reads (untrained, its own keys are the ones it can read). A written token: the same question, with a bank of
10k tokens and with all that was read, turn about.
"""

import argparse
import csv
import statistics
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.paired import now, paired  # noqa: E402
from lightning_memlong import MemLong  # noqa: E402
from lightning_memlong.bank import MemoryBank  # noqa: E402
from lightning_memlong.generation import Span, read_windows  # noqa: E402
from lightning_memlong.progress import token_bar  # noqa: E402

EARLY, QUESTION = 10_240, "Who was on board of the ship, and what became of them?"


def standard_library() -> list[str]:
    """Text that is on every machine."""
    return [str(file) for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


def tokens_of(files: list[str], count: int, model: MemLong) -> np.ndarray:
    """The first so many tokens of files, one after the other."""
    found: list[int] = []
    for file in files:
        found += model.long_context.tokenise(Path(file).read_text()).tolist()
        if len(found) >= count:
            break
    return np.asarray(found[:count])


def read(model: MemLong, bank: MemoryBank, tokens: np.ndarray, window: int) -> list[tuple[int, float]]:
    """Tokens and seconds of each window."""
    steps, begin = [], now()
    with token_bar() as bar:
        bar.begin(len(tokens), "reading")
        for count in read_windows(model, model.retrieval, bank, [Span(tokens)], window):
            steps.append((count, now() - begin))
            begin = now()
            bar.advance(count)
    return steps


def by_tenths(steps: list[tuple[int, float]]) -> list[float]:
    """Tokens a second in each tenth of the document: of the median window, so that one hiccup does not count."""
    parts = np.array_split(np.arange(len(steps)), 10)
    return [statistics.median(steps[i][0] / steps[i][1] for i in part) for part in parts]


def layers_left_out(model: MemLong, tokens: np.ndarray, window: int, rounds: int) -> dict[str, float]:
    """Seconds of a window read by all layers and by those that are needed, the slower one last."""
    ids = torch.from_numpy(tokens[:window])[None].to(model.device)

    @torch.no_grad()
    def everything() -> None:
        output = model(ids, logits_to_keep=1)
        assert output.keys is not None

    seconds, _ = paired({"needed": lambda: model.capture(ids), "all layers": everything}, rounds)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="without any: sources of the standard library")
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--source", default="single", choices=["single", "per_layer"])
    parser.add_argument("--dtype", default="auto", help="of the bank")
    parser.add_argument("--csv", help="file for tokens and seconds of each window")
    options = parser.parse_args()
    readers = {"retrieval_layers": [11]} if options.source == "single" else {}
    memory = {"top_k": 3, "dtype": options.dtype, "retriever": {"cache": False}}
    model = MemLong.from_pretrained("smollm2-135m", memory, memory_layer=11, source=options.source, **readers)
    tokens = tokens_of(options.files or standard_library(), options.tokens, model)
    print(f"{len(tokens):,} tokens, windows of {options.window}, {options.source}, {torch.get_num_threads()} threads")
    seconds = layers_left_out(model, tokens, options.window, options.rounds)
    ratio = seconds["all layers"] / seconds["needed"]
    print(f"a window: all layers {seconds['all layers']:.3f} s, those needed {seconds['needed']:.3f} s: {ratio:.2f} x")
    banks = {}
    for name, count in (("10k", EARLY), ("all", len(tokens))):
        banks[name] = model.retrieval.new_bank(1, count + 8192)
        steps = read(model, banks[name], tokens[:count], options.window)
    if options.csv:
        with open(options.csv, "w", newline="") as out:
            csv.writer(out).writerows([("tokens", "seconds"), *steps])
    tenths = by_tenths(steps)
    print("tokens/s by tenths of the document: " + ", ".join(f"{t:,.0f}" for t in tenths))
    print(f"last tenth / first tenth: {tenths[-1] / tenths[0]:.3f}")
    count = sum(t for t, _ in steps)
    print(f"altogether {count / sum(s for _, s in steps):,.0f} tokens/s, retriever and bank included")
    for written in (16, 272):  # within the first chunk; over three retrievals
        arguments = {"max_new_tokens": written, "min_new_tokens": written, "window": 512}
        ways = {
            name: lambda bank=bank: model.generate(QUESTION, bank, **arguments)  # noqa: B023  (called at once)
            for name, bank in reversed(banks.items())
        }
        each, ratios = paired(ways, options.rounds)
        told = ", ".join(f"{name}: {1000 * s / written:.2f} ms" for name, s in each.items())
        print(f"a token of {written} written, question included ({told}): all / 10k = {ratios['all']:.3f}")


if __name__ == "__main__":
    main()
