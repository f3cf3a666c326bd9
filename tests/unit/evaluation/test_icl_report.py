"""Intervals of in-context learning: what is asked again is no further example."""

from typing import Any

from lightning_memlong.evaluation.icl_report import report_icl


def measured(seed: int, asked: list[int], hits: str) -> dict[str, Any]:
    way = {"task": "MR", "seed": seed, "context": 0, "memory": 0, "selection": "off"}
    return way | {"hits": hits, "calibrated": hits, "majority": len(hits) // 2, "asked": asked}


def test_an_example_asked_by_every_seed_is_one() -> None:
    once, order = measured(0, list(range(20)), "01" * 10), list(range(19, -1, -1))
    again = [once, *(measured(seed, order, "10" * 10) for seed in range(1, 6))]
    other = [once, *(measured(seed, list(range(20 * seed, 20 * seed + 20)), "01" * 10) for seed in range(1, 6))]
    (one,), (same,), (more,) = (report_icl("", ["MR"], rows).data for rows in ([once], again, other))
    assert one["accuracy"] == same["accuracy"] == more["accuracy"] == 0.5
    assert (same["accuracy_low"], same["accuracy_high"]) == (one["accuracy_low"], one["accuracy_high"])
    assert more["accuracy_low"] > one["accuracy_low"] and more["accuracy_high"] < one["accuracy_high"]
