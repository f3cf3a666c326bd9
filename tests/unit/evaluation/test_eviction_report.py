"""Tables of eviction, by hand."""

import math
from typing import Any

import pytest

from lightning_memlong.evaluation.eviction_report import EVERYTHING, report_eviction
from lightning_memlong.evaluation.grid import OFF
from lightning_memlong.evaluation.record import Measurement

FIRST = {"corpus": "books", "document": "a", "text": "1"}


def row(policy: str, capacity: int, what: str, place: int, **facts: Any) -> Measurement:
    return {**FIRST, "policy": policy, "capacity": capacity, "what": what, "place": place, **facts}


def fact(policy: str, capacity: int, what: str, right: int, **kept: int) -> Measurement:
    scored = {"nll": 3.0, "tokens": 5, "correct": int(right == 5), "right_tokens": right}
    return row(policy, capacity, what, 0, **scored, **kept)


MEASURED = [
    *(row(OFF, 0, "window", end, nll=10 * math.log(12.0), tokens=10) for end in (100, 200)),
    *(row(EVERYTHING, 0, "window", end, nll=10 * math.log(8.0), tokens=10) for end in (100, 200)),
    row("fifo", 64, "window", 100, nll=10 * math.log(9.0), tokens=10, wanted=4, there=1),
    row("fifo", 64, "window", 200, nll=10 * math.log(16.0), tokens=10, wanted=4, there=2),
    row("fifo", 64, "churn", 0, evictions=50, used=20, entries=3, reach=48),
    fact(OFF, 0, "silent", 0),
    fact(EVERYTHING, 0, "silent", 5, kept=1, hit=1),
    fact("fifo", 64, "asked", 4, kept=1, hit=0, asked=3),
    fact("fifo", 64, "silent", 1, kept=0, hit=0, asked=0),
]


def test_perplexity_facts_and_what_was_evicted() -> None:
    report = report_eviction("tiny", ["fifo"], [64], MEASURED, 0)
    perplexity, facts, churn = report.tables.values()
    assert [list(r.values())[0] for r in perplexity] == [OFF, EVERYTHING, "fifo"]
    assert perplexity[1] == {"memory": EVERYTHING, "64": "8.000"}
    assert perplexity[0]["64"].startswith("12.000 (1.500, 1.500..1.500)")
    assert perplexity[2]["64"] == "12.000 (1.500, 1.125..2.000)", "sqrt(9 * 16); the interval is over the two windows"
    assert facts[0] == {"memory": OFF, "bank": "", "asked: kept [%]": "", "asked: retrieved [%]": "",
                        "asked: tokens right [%]": "0", "never asked: kept [%]": "", "never asked: retrieved [%]": "",
                        "never asked: tokens right [%]": "0", "facts": 1}  # fmt: skip
    assert list(facts[2].values()) == ["fifo", "64", "100", "0", "80", "0", "0", "20", 1]
    assert list(churn[0].values()) == ["fifo", "64", 50, "60", "3", "48", "38"] and len(churn) == 1
    fifo = report.data[-1]
    assert fifo["by_off"] == pytest.approx(1.0) and fifo["drawn"] == "windows" and fifo["tokens"] == 20
    assert all(list(r) == list(fifo) for r in report.data), "one file, the same columns"
    assert len(report.figures["capacity"].axes) == 3


def test_what_no_model_has_read_has_no_perplexity() -> None:
    kept = [{k: v for k, v in r.items() if k not in ("nll", "tokens", "correct", "right_tokens")} for r in MEASURED]
    kept = [r for r in kept if r["policy"] != OFF and (r["policy"], r["what"]) != (EVERYTHING, "window")]
    report = report_eviction("tiny", ["fifo", "attention received"], [64], kept, 0)
    assert list(report.tables) == ["books: facts planted early, asked for at the end", "books: what was evicted"]
    facts, churn = report.tables.values()
    assert list(facts[1].values()) == ["fifo", "64", "100", "0", "0", "0", 1] and churn[0]["still there [%]"] == "38"
    assert report.data[-1]["perplexity"] is None and [r["policy"] for r in report.data] == [EVERYTHING, "fifo"]
    assert not any("perplexity" in note for note in report.notes)


def test_without_facts_there_is_one_panel_and_no_table_of_them() -> None:
    report = report_eviction("tiny", ["fifo"], [64], [r for r in MEASURED if r["what"] not in ("asked", "silent")], 0)
    assert list(report.tables) == ["books: perplexity", "books: what was evicted"]
    assert len(report.figures["capacity"].axes) == 1 and report.data[-1]["asked_kept"] is None
