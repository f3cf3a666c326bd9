"""What each way of using a long text is worth and costs, from the measurements in ``docs/results``: tables, a picture.

    python benchmarks/at_a_glance.py

Reads ``alternatives.csv`` (a row a document and way, of ``conf/eval/alternatives.yaml``) and ``ruler-alternatives.csv``
(the same of ``conf/eval/ruler.yaml`` with ``evaluation.alternatives``). Both are of the same weights.
"""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from lightning_memlong.evaluation.statistics import Ratio, paired_ratio

RESULTS = Path(__file__).parents[1] / "docs" / "results"
NAMES = {
    "off": "memory off",
    "retrieved": "memory, chosen chunks",
    "similarity": "memory, chosen chunks",
    "recent": "memory, newest chunks",
    "random": "memory, random chunks",
    "trained window": "window it was trained for",
    "longer window": "window it was trained for",  # as long as window and chunks, at most that; with these it is that
}
"""What rows of the two evaluations are called here; others are called what they are there."""
MARKS = "oDsv^PX*h"
KINDS = ("lifted", "copied", "rest")
"""Kinds of tokens, as :mod:`lightning_memlong.evaluation.token_kinds` has them."""


class Way:
    """What was measured of one way: nothing of it is rounded."""

    def __init__(self) -> None:
        self.losses: dict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
        """Corpus -> document, window and length -> what its loss is more than with memory off, and tokens."""
        self.kinds: dict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        """Corpus and kind -> tokens of that kind, and what their loss is more than with memory off."""
        self.megabytes: list[float] = []
        self.seconds: list[float] = []
        self.right: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """RULER's task -> of each document, tokens of the answers that are right, and all of them."""

    def ratio(self, corpus: str, other: "Way | None" = None) -> Ratio | None:
        """Perplexity by that of another way, or of memory off, on the same pieces; its interval over them, 95 %."""
        if not (found := self.losses.get(corpus)):
            return None
        more, tokens = (np.array(numbers) for numbers in zip(*found.values(), strict=True))
        others = np.zeros(len(more)) if other is None else np.array([other.losses[corpus][piece][0] for piece in found])
        return paired_ratio(more, others, tokens, np.arange(len(more)))

    def share(self, task: str) -> float | None:
        """Of the answers' tokens, those that are right."""
        found = self.right.get(task)
        return None if not found else sum(right for right, _ in found) / sum(tokens for _, tokens in found)


def read() -> dict[str, Way]:
    """Ways by name, in the order of the files."""
    ways: dict[str, Way] = defaultdict(Way)
    for row in _rows("alternatives.csv"):
        way = ways[NAMES.get(row["setting"], row["setting"])]
        more = float(row["nll"]) - float(row["nll_off"])
        way.losses[row["corpus"]][f"{row['document']} {row['window']} {row['length']}"] = more, int(row["tokens"])
        for kind in KINDS if row["rest_tokens"] else ():
            tokens, so_far = way.kinds[row["corpus"], kind]
            more = float(row[f"{kind}_nll"]) - float(row[f"{kind}_nll_off"])
            way.kinds[row["corpus"], kind] = tokens + int(row[f"{kind}_tokens"]), so_far + more
        way.megabytes.append(float(row["held"]) / 1e6)
        way.seconds.append(float(row["seconds"]))
    for row in _rows("ruler-alternatives.csv"):
        way = ways[NAMES.get(row["setting"], row["setting"])]
        way.right[row["task"]].append((int(row["right_tokens"]), int(row["tokens"])))
    return dict(ways)


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as stream:
        return list(csv.DictReader(stream))


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_interval(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f}..{ratio.high:.3f})"


def table(ways: Mapping[str, Way], corpora: Sequence[str], tasks: Sequence[str]) -> str:
    """Markdown: a row a way."""
    names = [*corpora, *(f"{task} [%]" for task in tasks), "keys and values [MB]", "time [s]"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, way in ways.items():
        cells = [_with_interval(way.ratio(corpus)) for corpus in corpora]
        cells += [_shown(way.share(task), ".0%").rstrip("%") for task in tasks]
        cells += [_shown(statistics.mean(way.megabytes) if way.megabytes else None, ",.0f")]
        cells += [_shown(statistics.median(way.seconds) if way.seconds else None, ".0f")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against(ways: Mapping[str, Way], corpora: Sequence[str]) -> str:
    """Markdown: perplexity with chosen chunks by that of each other way."""
    memory = ways[NAMES["retrieved"]]
    lines = [f"| {NAMES['retrieved']}, by | {' | '.join(corpora)} |", "|---" * (len(corpora) + 1) + "|"]
    for name, way in ways.items():
        if way is not memory and way.losses:
            cells = [_with_interval(memory.ratio(corpus, way)) for corpus in corpora]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_kinds(ways: Mapping[str, Way], corpora: Sequence[str]) -> str:
    """Markdown: perplexity by memory off on each kind of tokens, a row a way."""
    counted = next(way.kinds for way in ways.values() if way.kinds)
    columns = [(corpus, kind) for corpus in corpora for kind in KINDS]
    names = [f"{corpus}: {kind} ({counted[corpus, kind][0]:,})" for corpus, kind in columns]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, way in ways.items():
        if way.kinds:
            cells = [f"{math.exp(more / tokens):.3f}" for tokens, more in (way.kinds[place] for place in columns)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(ways: Mapping[str, Way], corpora: Sequence[str], file: Path) -> None:
    """Perplexity by memory off against keys and values held: a panel a corpus, documents small, all of them large."""
    size = (4.2 * len(corpora) + 2.6, 3.9)
    figure, panels = plt.subplots(1, len(corpora), figsize=size, layout="constrained", squeeze=False)
    for axes, corpus in zip(panels[0], corpora, strict=True):
        for number, (name, way) in enumerate(ways.items()):
            if (ratio := way.ratio(corpus)) is None:
                continue
            colour, mark, place = f"C{number}", MARKS[number % len(MARKS)], statistics.mean(way.megabytes)
            each = [math.exp(more / tokens) for more, tokens in way.losses[corpus].values()]
            axes.plot([place] * len(each), each, mark, color=colour, markersize=4, alpha=0.35)
            axes.plot(place, ratio.value, mark, color=colour, markersize=9, label=name)
        axes.axhline(1.0, color="0.4", linewidth=1)
        axes.set(xscale="log", xlabel="keys and values held [MB]", title=corpus)
        axes.set_xticks([100, 200, 400], ["100", "200", "400"], minor=False)
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("perplexity / memory off")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(file, dpi=130)


def main() -> None:
    """Print the tables and draw the picture."""
    ways = read()
    corpora = list(dict.fromkeys(corpus for way in ways.values() for corpus in way.losses))
    tasks = list(dict.fromkeys(task for way in ways.values() for task in way.right))
    print(table(ways, corpora, tasks), against(ways, corpora), of_kinds(ways, corpora), sep="\n\n")
    draw(ways, corpora, RESULTS / "at-a-glance.png")
    print(f"\nPicture: {RESULTS / 'at-a-glance.png'}")


if __name__ == "__main__":
    main()
