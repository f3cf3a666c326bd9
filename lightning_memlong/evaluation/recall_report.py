"""What recall probes found: accuracy over depth and length, and whether what was planted was retrieved."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from lightning_memlong.evaluation.base import Report
from lightning_memlong.evaluation.figures import draw_recall
from lightning_memlong.evaluation.record import Row
from lightning_memlong.evaluation.statistics import LEVEL


def report(evaluation: Any, rows: Sequence[Row]) -> Report:
    """Tables and figures of the probes of a :class:`RecallProbes`."""
    kinds = [k for k in evaluation.kinds if any(r["kind"] == k for r in rows)]
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    data = [
        _summary(_of(rows, kind, setting, length, depth))
        for kind in kinds for setting in settings for length in evaluation.lengths for depth in evaluation.depths
        if _of(rows, kind, setting, length, depth)
    ]  # fmt: skip
    tables = {f"{kind}: planted before the window": _table(evaluation, rows, kind, settings) for kind in kinds}
    notes = [
        "right: each token of the answer is the most likely one, as greedy decoding would write it; in brackets: 95 % "
        "Wilson interval.",
        "tokens right: of the answers' tokens, given the true ones before them.",
        "retrieved: what was planted, or a part of it, is among the chunks retrieved.",
        "The tables leave out documents whose planted text lies in the window; the picture has them.",
    ]
    figure = draw_recall(data, kinds, settings, evaluation.title)
    return Report(f"Recall: {evaluation.title}", notes, tables, data, {"accuracy": figure})


def _of(rows: Sequence[Row], kind: str, setting: str, length: int, depth: float | None = None) -> list[Row]:
    wanted = (kind, setting, length)
    same = [r for r in rows if (r["kind"], r["setting"], r["length"]) == wanted]
    return same if depth is None else [r for r in same if r["depth"] == depth]


def _summary(cell: Sequence[Row]) -> Row:
    first = cell[0]
    hits = [r["hit"] for r in cell if "hit" in r and not r["local"]]
    return {
        **{k: first[k] for k in ("kind", "setting", "length", "depth")}, "documents": len(cell),
        "right": float(np.mean([r["correct"] for r in cell])),
        "tokens_right": sum(r["right_tokens"] for r in cell) / sum(r["tokens"] for r in cell),
        "retrieved": float(np.mean(hits)) if hits else None,
        "nll_per_token": sum(r["nll"] for r in cell) / sum(r["tokens"] for r in cell),
    }  # fmt: skip


def _table(evaluation: Any, rows: Sequence[Row], kind: str, settings: Sequence[str]) -> list[Row]:
    table = []
    for length in evaluation.lengths:
        for setting in settings:
            cell = [r for r in _of(rows, kind, setting, length) if not r["local"]]
            if not cell:
                continue
            found = _summary(cell)
            table.append({
                "tokens": f"{length:,}", "memory": setting, "documents": len(cell),
                "right [%]": _share(sum(r["correct"] for r in cell), len(cell)),
                "tokens right [%]": f"{100 * found['tokens_right']:.0f}",
                "loss of a token": f"{found['nll_per_token']:.3f}",
                "retrieved [%]": "" if found["retrieved"] is None else f"{100 * found['retrieved']:.0f}",
            })  # fmt: skip
    return table


def _share(right: int, count: int) -> str:
    """A share with its Wilson interval."""
    interval = binomtest(right, count).proportion_ci(LEVEL, method="wilson")
    return f"{100 * right / count:.0f} ({100 * interval.low:.0f}..{100 * interval.high:.0f})"
