"""Pictures of a validation: where windows retrieved from, and a number of each layer and head."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def draw_map(places: Sequence[tuple[int, int, float]], title: str, chunk_size: int) -> Figure:
    """Where each window of a document retrieved from: what is read runs to the right, what is retrieved upwards.

    Args:
        places: Where it was read, where the chunk begins, and its similarity (NaN: the selection has none).
        title: Of the document.
        chunk_size: Tokens of a chunk.
    """
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    reading, found, scores = (list(column) for column in zip(*places, strict=True))
    end = max(reading) + chunk_size
    axes.plot([0, end], [0, end], color="0.7", linewidth=1)
    axes.annotate("now", (0.98 * end, 0.98 * end), ha="right", va="bottom", fontsize=8, color="0.5", rotation=40)
    scored = any(score == score for score in scores)
    image = axes.scatter(reading, found, c=scores if scored else "tab:blue", s=22, marker="s", cmap="viridis")
    if scored:
        figure.colorbar(image, ax=axes, label="similarity")
    axes.set_xlim(0, end)
    axes.set_ylim(0, end)
    axes.set_xlabel("where we are reading [tokens]")
    axes.set_ylabel("what was retrieved [tokens]")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def draw_heads(values: Mapping[int, Any], label: str) -> Figure:
    """A number of each layer and head as a picture.

    Args:
        values: Layer -> (H,).
        label: What they are.
    """
    table = [values[layer].tolist() for layer in sorted(values)]
    figure = Figure(figsize=(max(4.5, 0.3 * len(table[0]) + 2), max(2.5, 0.22 * len(table) + 1)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(table, aspect="auto", cmap="magma", origin="lower", interpolation="nearest")
    axes.set_yticks(range(len(table)), [str(layer) for layer in sorted(values)], fontsize=7)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=label)
    return figure
