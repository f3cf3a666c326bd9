"""What memory is worth in perplexity, without a training step, against controls on the same tokens.

    python benchmarks/memory_value.py                          # the standard library's sources
    python benchmarks/memory_value.py book.txt "A name=chapter.tex"   # your own files, one document each

For every file, the same windows are scored with the same weights: memory off, retrieved chunks (the default, causal),
the most recent chunks, random chunks, the reference code's leaking query, and the paper's single stored layer before
any tuning. Writes a table (Markdown and CSV) and a picture into benchmarks/results/.
"""

import argparse
import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.progress import Progress

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import matplotlib.pyplot as plt  # noqa: E402

from lightning_memlong.cli.main import MemLongCLI  # noqa: E402

ROOT = Path(__file__).parents[1]
ABLATIONS = ROOT / "conf" / "ablations"
SETTINGS = {
    "retrieved (default)": [],
    "recent": ["--config", str(ABLATIONS / "recent.yaml")],
    "random": ["--config", str(ABLATIONS / "random.yaml")],
    "each chunk retrieves": ["--config", str(ABLATIONS / "granularity_chunk.yaml")],
    "each chunk, random": ["--config", str(ABLATIONS / "granularity_chunk.yaml"), "--memory.selection", "random"],
    "current query (LEAKS)": ["--config", str(ABLATIONS / "query_current.yaml")],
    "single, joint": ["--config", str(ABLATIONS / "single.yaml")],
    "single, gated (untrained)": ["--config", str(ABLATIONS / "single_gated.yaml")],
}


@dataclass
class Curve:
    """Loss of each window of a file, in order."""

    on: list[float]
    off: list[float]
    tokens: list[int]
    end: list[int]

    def perplexity(self, which: str) -> float:
        """Token-weighted perplexity."""
        losses = getattr(self, which)
        return math.exp(sum(a * n for a, n in zip(losses, self.tokens, strict=True)) / sum(self.tokens))


@torch.no_grad()
def evaluate(
    file: str | None, settings: list[str], windows: int, options: list[str], progress: Any, off: list[float] | None
) -> Curve:
    """Score a file window by window with memory, and without unless ``off`` gives these losses already."""
    quiet = ["--trainer.logger", "false", "--trainer.callbacks", "null"]
    data = ["--data.path", file, "--data.split", "all", "--data.min_document_tokens", "512"] if file else []
    cli = MemLongCLI(["--config", str(ROOT / "conf" / "memlong.yaml"), *quiet, *data, *options, *settings], run=False)
    module: Any = cli.model.eval().to(cli.trainer.strategy.root_device)
    callback: Any = cli.trainer.memory_callback()
    cli.datamodule.setup("validate")
    callback.setup(cli.trainer, module, "validate")
    curve = Curve([], [], [], [])
    for number, batch in enumerate(cli.datamodule.val_dataloader()):
        if number == windows:
            break
        batch = {k: v.to(module.device) for k, v in batch.items()}
        callback.retrieve("val", batch, module)
        on = module(batch)
        callback.store("val", {"keys": on.keys, "values": on.values}, batch, module)
        curve.on.append(float(on.loss))
        if off is None:
            curve.off.append(float(module.model(batch["input_ids"], batch["labels"]).loss))
        else:
            curve.off.append(off[number])
        curve.tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
        curve.end.append(int(batch["offset"][0] + batch["length"][0]))
        progress()
    return curve


def draw(curves: dict[str, dict[str, Curve]], target: Path) -> None:
    """Perplexity along each document with memory and without; thin: each window, thick: running mean of eight."""
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.8 * columns, 3.1 * rows), squeeze=False)
    axes = list(grid.flat)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    for axis, (name, by_setting) in zip(axes, curves.items(), strict=False):
        curve = by_setting.get("retrieved (default)") or next(iter(by_setting.values()))
        for losses, label, color in ((curve.off, "memory off", "#888888"), (curve.on, "memory on", "#1f6feb")):
            axis.plot(curve.end, [math.exp(x) for x in losses], color=color, alpha=0.3, linewidth=0.8)
            smooth = [math.exp(sum(losses[max(0, i - 7) : i + 1]) / len(losses[max(0, i - 7) : i + 1]))
                      for i in range(len(losses))]  # fmt: skip
            axis.plot(curve.end, smooth, color=color, linewidth=2, label=label)
        ratio = curve.perplexity("on") / curve.perplexity("off")
        axis.set_title(f"{name}: on / off = {ratio:.3f}", fontsize=10)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens read")
        axis.set_ylabel("perplexity of a window")
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def write(curves: dict[str, dict[str, Curve]], folder: Path) -> None:
    """The tables."""
    lines = ["| memory | " + " | ".join(curves) + " |", "|---|" + "---|" * len(curves)]
    settings = list(next(iter(curves.values())))
    off = {name: by[settings[0]].perplexity("off") for name, by in curves.items()}
    lines.append("| off | " + " | ".join(f"{value:.2f}" for value in off.values()) + " |")
    for setting in settings:
        values = {name: by[setting].perplexity("on") for name, by in curves.items()}
        lines.append(f"| {setting} | " + " | ".join(f"{v:.2f} ({v / off[k]:.3f})" for k, v in values.items()) + " |")
    (folder / "memory_value.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    with (folder / "memory_value.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["document", "memory", "window", "tokens_read", "tokens_scored", "loss_on", "loss_off"])
        for name, by in curves.items():
            for setting, c in by.items():
                rows = zip(c.end, c.tokens, c.on, c.off, strict=True)
                out.writerows([name, setting, i, *(round(x, 5) for x in row)] for i, row in enumerate(rows))


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="text files, one document each, as FILE or NAME=FILE; none: "
                        "the validation split of the standard library's sources")  # fmt: skip
    parser.add_argument("--windows", type=int, default=32, help="windows scored of each file [windows]")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME",
                        help="rows of the table; none: all")  # fmt: skip
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write into")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of train.py")
    args = parser.parse_args()
    sys.argv = sys.argv[:1]
    folder = args.output
    folder.mkdir(exist_ok=True, parents=True)
    curves: dict[str, dict[str, Curve]] = {}
    with Progress() as bar:
        task = bar.add_task("windows", total=len(args.settings) * max(1, len(args.files)) * args.windows)
        for file in args.files or [None]:
            name, _, path = file.rpartition("=") if file else ("standard library", "", None)
            name = name or Path(path).stem
            curves[name] = {}
            off = None
            for label in args.settings:
                curve = evaluate(path, SETTINGS[label], args.windows, args.options, lambda: bar.advance(task), off)
                curves[name][label], off = curve, curve.off
    write(curves, folder)
    draw(curves, folder / "memory_value.png")
    print(f"Written to {folder}: memory_value.md, memory_value.csv, memory_value.png")


if __name__ == "__main__":
    main()
