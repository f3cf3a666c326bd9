"""What the page shows, as HTML and pictures. Text of a book is escaped: it may say anything."""

from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from lightning_memlong.look.attended import Attended, Chunk
from lightning_memlong.look.looker import Sight

FULL = 2.0
"""Gain or loss at which a token's colour is full [nats]."""
GAINED, LOST = "31, 119, 180", "230, 120, 20"
"""Blue and orange: told apart by everybody."""


def similarity(chunk: Chunk) -> str:
    """How similar a chunk was to what asked; nothing where the selection has no similarities."""
    return "" if chunk.similarity != chunk.similarity else f"similarity {chunk.similarity:.2f}"


def worth(sight: Sight) -> str:
    """One line: what memory was worth to a sentence."""
    on, off = float(sight.on.mean()), float(sight.off.mean())
    if not sight.chunks:
        return f"loss {off:.3f} nats a token; nothing is retrieved: nothing in memory ends before the local text"
    change = 100 * (float((sight.on.mean() - sight.off.mean()).exp()) - 1)
    return f"loss {off:.3f} nats a token without memory, {on:.3f} with it: perplexity {change:+.1f} %"


def coloured_tokens(sight: Sight) -> str:
    """Tokens on blue where memory helped to predict them, on orange where it hurt; the numbers when pointed at."""
    spans = []
    for piece, on, off in zip(sight.pieces, sight.on.tolist(), sight.off.tolist(), strict=True):
        gain = off - on
        strength = min(1.0, abs(gain) / FULL)
        colour = f"rgba({GAINED if gain > 0 else LOST}, {0.85 * strength:.3f})"
        told = f"loss {off:.2f} without memory, {on:.2f} with it"
        shown = escape(piece).replace("\n", "⏎<br>")
        spans.append(f'<span class="token" style="background:{colour}" title="{told}">{shown}</span>')
    legend = (
        f'<p class="legend"><i style="background:rgba({GAINED}, 0.85)"></i> memory helped '
        f'<i style="background:rgba({LOST}, 0.85)"></i> it hurt; full colour at {FULL:g} nats. Point at a token for '
        "its losses.</p>"
    )
    return f'<div class="tokens">{"".join(spans)}</div>{legend}'


def strip(whole: int, page: tuple[int, int], found: Attended | None, place: int | None) -> str:
    """The book from its first token to its last as a strip: the page, the sentence, and what was retrieved.

    Args:
        whole: Length of the book [tokens].
        page: From and to [tokens].
        found: What was retrieved, for a sentence or a question; what is attended to more is higher. None: nothing yet.
        place: Where the sentence begins [tokens]; None: it is no sentence.
    """
    width, height = 1000, 34
    at = width / max(1, whole)
    marks = [f'<rect x="{page[0] * at:.1f}" y="0" width="{max(2.0, (page[1] - page[0]) * at):.1f}" '
             f'height="{height}" fill="#cfd8e3"/>']  # fmt: skip
    if found is not None:
        shares = found.share().tolist()
        for chunk, share in zip(found.chunks, shares, strict=True):
            tall = 6 + (height - 6) * share / max(*shares, 1e-9)
            told = f"tokens {chunk.start:,} to {chunk.end:,}: {100 * share:.2f} % of attention"
            marks.append(
                f'<rect x="{chunk.start * at:.1f}" y="{height - tall:.1f}" height="{tall:.1f}" fill="rgb({GAINED})" '
                f'width="{max(3.0, (chunk.end - chunk.start) * at):.1f}"><title>{told}</title></rect>'
            )
    if place is not None:
        marks.append(f'<rect x="{place * at:.1f}" y="0" width="3" height="{height}" fill="#d62728"/>')
    drawn = "".join(marks)
    return (
        f'<svg class="strip" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="where in the book">{drawn}</svg>'
    )


def draw_written(found: Attended, pieces: Sequence[str], most: int = 12) -> Figure:
    """How much of its attention each written token gave each chunk: tokens to the right, chunks upwards.

    Args:
        found: k chunks, and the attention of n tokens.
        pieces: (n,) what the tokens say.
        most: Chunks shown, those that got most attention.
    """
    shares = found.by_token()
    shown = found.share().argsort(descending=True)[:most].sort().values
    tokens = shares.shape[1]
    figure = Figure(figsize=(min(14.0, max(6.0, 0.16 * tokens + 2)), 0.26 * len(shown) + 2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares[shown], aspect="auto", cmap="magma", interpolation="nearest", origin="lower")
    axes.set_yticks(range(len(shown)), [f"{found.chunks[i].start:,}" for i in shown.tolist()], fontsize=8)
    axes.set_ylabel("chunk, by its first token")
    every = max(1, tokens // 60)
    labels = [" ".join(pieces[i].split()).replace("$", r"\$") or "·" for i in range(0, tokens, every)]
    axes.set_xticks(range(0, tokens, every), labels, rotation=90, fontsize=7)
    figure.colorbar(image, ax=axes, label="% of attention")
    return figure
