"""Which tokens gain: those that a longer plain window lifts, those that were copied from far back, and the rest."""

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_memlong.evaluation.base import TableRow
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.statistics import Ratio, bootstrap_groups, paired_ratio

LIFTED = 2.0
"""By how much a long context must lower a token's loss, and to what at most [nats] (LongPPL, arXiv 2410.23771)."""
KINDS = ("lifted", "copied", "rest")
TITLES = {
    "lifted": "lifted by a longer window",
    "copied": "copied from memory's part",
    "rest": "the rest",
}


def token_kinds(
    tokens: np.ndarray, scored: int, local: int, off: np.ndarray, long: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Kind -> which of the scored tokens are of it, bool (S,); each is of one.

    Lifted: a longer plain window lowers the loss by more than 2 nats, to less than 2. Copied, of the others: the token
    and the one before it stand next to each other before the window too, and not yet in the window.

    Args:
        tokens: (T,) the context, the scored tokens at its end.
        scored: How many, S.
        local: Tokens of the window.
        off: (S,) losses in the window alone.
        long: (S,) losses in the longest plain window that was measured; None: there is none.
    """
    lifted = np.zeros(scored, dtype=bool) if long is None else (off - long > LIFTED) & (long < LIFTED)
    pairs = list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    far, near = set(pairs[: max(0, len(tokens) - local - 1)]), set(pairs[max(0, len(tokens) - local) : -scored])
    copied = np.zeros(scored, dtype=bool)
    for place, pair in enumerate(pairs[-scored:]):
        copied[place] = pair in far and pair not in near
        near.add(pair)
    copied &= ~lifted
    return {"lifted": lifted, "copied": copied, "rest": ~lifted & ~copied}


def sums_of(kinds: Mapping[str, np.ndarray], losses: np.ndarray, off: np.ndarray) -> dict[str, list[float]]:
    """Kind -> number of tokens, their summed loss, and that with memory off; for a measurement."""
    found = {}
    for kind, which in kinds.items():
        found[kind] = [int(which.sum()), float(losses[which].sum()), float(off[which].sum())]
    return found


def kinds_table(rows: Sequence[Measurement], seed: int) -> list[TableRow]:
    """Perplexity by memory off for each kind of token; empty where nothing was told apart."""
    told = [r for r in rows if r.get("kinds")]
    table: list[TableRow] = []
    for name in dict.fromkeys(r["setting"] for r in told):
        mine = [r for r in told if r["setting"] == name]
        table.append({"memory": name, **{_titled(kind, told): _ratio(kind, mine, seed) for kind in KINDS}})
    return table


def _titled(kind: str, rows: Sequence[Measurement]) -> str:
    one = [r for r in rows if r["setting"] == rows[0]["setting"]]
    share = sum(r["kinds"][kind][0] for r in one) / sum(r["tokens"] for r in one)
    return f"{TITLES[kind]} ({share:.1%} of tokens)"


def _ratio(kind: str, rows: Sequence[Measurement], seed: int) -> str:
    with_any = [r for r in rows if r["kinds"][kind][0]]
    if not with_any:
        return ""
    count, nll, off = (np.array([r["kinds"][kind][i] for r in with_any], dtype=float) for i in range(3))
    groups, _ = bootstrap_groups([r["document"] for r in with_any], [r["window"] for r in with_any])
    ratio: Ratio = paired_ratio(nll, off, count, groups, seed)
    return str(ratio)
