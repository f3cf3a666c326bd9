"""What recall probes found: accuracy over depth and length, and whether what was planted was retrieved."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from lightning_memlong.evaluation.base import Report, TableRow
from lightning_memlong.evaluation.figures import draw_recall
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.statistics import LEVEL


def report_recall(
    title: str,
    kinds: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    measurements: Sequence[Measurement],
) -> Report:
    """Tables and figures of recall probes."""
    kinds = [k for k in kinds if any(r["kind"] == k for r in measurements)]
    settings = list(dict.fromkeys(r["setting"] for r in measurements))
    data = [
        _summary(_of(measurements, kind, setting, length, depth))
        for kind in kinds for setting in settings for length in lengths for depth in depths
        if _of(measurements, kind, setting, length, depth)
    ]  # fmt: skip
    tables = {f"{kind}: planted before the window": _table(lengths, measurements, kind, settings) for kind in kinds}
    notes = [
        "right: each token of the answer is the most likely one, as greedy decoding would write it; in brackets: 95 % "
        "Wilson interval.",
        "tokens right: of the answers' tokens, given the true ones before them.",
        "retrieved: what was planted, or a part of it, is among the chunks retrieved.",
        "The tables leave out documents whose planted text lies in the window; the picture has them.",
    ]
    figure = draw_recall(data, kinds, settings, title)
    return Report(f"Recall: {title}", notes, tables, data, {"accuracy": figure})


def _of(
    measurements: Sequence[Measurement], kind: str, setting: str, length: int, depth: float | None = None
) -> list[Measurement]:
    wanted = (kind, setting, length)
    same = [r for r in measurements if (r["kind"], r["setting"], r["length"]) == wanted]
    return same if depth is None else [r for r in same if r["depth"] == depth]


def _summary(probes: Sequence[Measurement]) -> TableRow:
    first = probes[0]
    hits = [r["hit"] for r in probes if "hit" in r and not r["local"]]
    return {
        **{k: first[k] for k in ("kind", "setting", "length", "depth")}, "documents": len(probes),
        "right": float(np.mean([r["correct"] for r in probes])),
        "tokens_right": sum(r["right_tokens"] for r in probes) / sum(r["tokens"] for r in probes),
        "retrieved": float(np.mean(hits)) if hits else None,
        "nll_per_token": sum(r["nll"] for r in probes) / sum(r["tokens"] for r in probes),
    }  # fmt: skip


def _table(
    lengths: Sequence[int], measurements: Sequence[Measurement], kind: str, settings: Sequence[str]
) -> list[TableRow]:
    table = []
    for length in lengths:
        for setting in settings:
            probes = [r for r in _of(measurements, kind, setting, length) if not r["local"]]
            if not probes:
                continue
            found = _summary(probes)
            table.append({
                "tokens": f"{length:,}", "memory": setting, "documents": len(probes),
                "right [%]": _share(sum(r["correct"] for r in probes), len(probes)),
                "tokens right [%]": f"{100 * found['tokens_right']:.0f}",
                "loss of a token": f"{found['nll_per_token']:.3f}",
                "retrieved [%]": "" if found["retrieved"] is None else f"{100 * found['retrieved']:.0f}",
            })  # fmt: skip
    return table


def _share(right: int, count: int) -> str:
    """A share with its Wilson interval."""
    interval = binomtest(right, count).proportion_ci(LEVEL, method="wilson")
    return f"{100 * right / count:.0f} ({100 * interval.low:.0f}..{100 * interval.high:.0f})"
