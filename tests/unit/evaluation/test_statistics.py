"""Intervals, and the file of finished measurements."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from lightning_memlong.errors import UserError
from lightning_memlong.evaluation.record import Record
from lightning_memlong.evaluation.statistics import bootstrap_groups, mean_interval, paired_ratio, wilson


def test_a_ratio_is_that_of_token_weighted_perplexities() -> None:
    nll, off, tokens = np.array([10.0, 90.0]), np.array([12.0, 100.0]), np.array([10, 90])
    found = paired_ratio(nll, off, tokens, np.arange(2))
    assert found.value == pytest.approx(np.exp(100 / 100) / np.exp(112 / 100))
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("right, count", [(0, 1), (3, 10), (7, 7), (250, 500)])
def test_a_share_has_the_wilson_interval(right: int, count: int) -> None:
    known = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((right / count, known.low, known.high))
    assert all(wilson(share, n).low <= share <= wilson(share, n).high for n in range(1, 50) for share in (0.0, 1.0))
    assert wilson(0.35, 10).low < wilson(0.4, 10).low < 0.35 < wilson(0.35, 10).high


def test_the_interval_covers_what_it_says() -> None:
    """Of many bootstrap_groups of 30 documents, about 95 in 100 intervals hold the true mean difference."""
    mixer = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        tokens = np.full(30, 100)
        off = mixer.normal(300, 20, 30)
        nll = off + mixer.normal(-2, 5, 30)  # true ratio: exp(-0.02)
        found = paired_ratio(nll, off, tokens, np.arange(30))
        inside += found.low <= np.exp(-0.02) <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_windows_of_a_document_are_drawn_together_where_there_are_documents_enough() -> None:
    names = [f"d{i}" for i in range(5) for _ in range(3)]
    groups, what = bootstrap_groups(names, list(range(15)))
    assert what == "documents" and groups.tolist() == [i for i in range(5) for _ in range(3)]
    groups, what = bootstrap_groups(["a", "a", "b", "b"], [1, 2, 1, 2])
    assert what == "windows" and groups.tolist() == [0, 1, 2, 3]


def test_one_measurement_has_no_interval() -> None:
    found = paired_ratio(np.array([1.0]), np.array([2.0]), np.array([1]), np.array([0]))
    assert found.value == pytest.approx(np.exp(-1)) and np.isnan(found.low)
    assert mean_interval(np.array([1, 1, 1])) == (1.0, 1.0, 1.0)


def test_measurements_survive_a_line_that_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    record = Record(file, ("a",))
    record.add({"a": 1, "b": 2.5})
    record.add({"a": 1, "b": 9.0})
    record.add({"a": 2, "b": 3.5})
    with file.open("a") as out:
        out.write('{"a": 3, "b"')
    again = Record(file, ("a",))
    assert again.measurements == [{"a": 1, "b": 2.5}, {"a": 2, "b": 3.5}] and {"a": 3} not in again
    again.add({"a": 3, "b": 1.0})
    assert [r["a"] for r in Record(file, ("a",)).measurements] == [1, 2, 3]


@pytest.mark.parametrize("line", ["not json\n", '{"b": 1}\n', "[1]\n"])
def test_a_damaged_record_is_told(tmp_path: Path, line: str) -> None:
    (tmp_path / "cells.jsonl").write_text(line)
    with pytest.raises(UserError, match="delete the file"):
        Record(tmp_path / "cells.jsonl", ("a",))
