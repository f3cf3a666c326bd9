"""Tokens are told apart by what could have helped with them."""

import numpy as np

from lightning_memlong.evaluation.token_kinds import kinds_table, sums_of, token_kinds

#                    before the window      the window, of which the last four are scored
TEXT = np.array([7, 8, 9, 1, 2, 5, 6, 3, 1, 2, 4, 7, 8, 9, 1, 2])


def test_copied_is_what_stood_there_before_the_window_and_not_yet_in_it() -> None:
    kinds = token_kinds(TEXT, scored=4, local=8, off=np.zeros(4), long=None)
    # 7 8, 8 9, 9 1 stand before the window; 1 2 stands there too, but in the window as well
    assert kinds["copied"].tolist() == [True, True, True, False]
    assert kinds["rest"].tolist() == [False, False, False, True]
    assert not kinds["lifted"].any()


def test_a_pair_across_the_edge_of_the_window_is_in_neither() -> None:
    text = np.array([1, 2, 3, 4, 9, 2, 3])
    kinds = token_kinds(text, scored=1, local=5, off=np.zeros(1), long=None)  # the window begins at 3
    assert kinds["copied"].tolist() == [False]


def test_a_pair_of_scored_tokens_is_copied_from_far_once_only() -> None:
    text = np.array([1, 2, 0, 0, 1, 2, 1, 2])
    assert token_kinds(text, 4, 5, np.zeros(4), None)["copied"].tolist() == [False, True, False, False]


def test_lifted_goes_before_copied() -> None:
    off, long = np.array([5.0, 5.0, 1.0, 9.0]), np.array([1.0, 4.0, 0.5, 3.0])
    kinds = token_kinds(TEXT, 4, 8, off, long)  # by more than 2, to less than 2
    assert kinds["lifted"].tolist() == [True, False, False, False]
    assert kinds["copied"].tolist() == [False, True, True, False]
    assert sum(k.sum() for k in kinds.values()) == 4


def test_the_table_has_ratios_of_each_kind() -> None:
    off = np.array([2.0, 2.0, 2.0, 2.0])
    kinds = {"lifted": np.array([True, False, False, False]), "copied": np.array([False, True, False, False]),
             "rest": np.array([False, False, True, True])}  # fmt: skip
    losses = np.array([1.0, 1.5, 2.0, 2.0])
    rows = [
        {"setting": "retrieved", "document": name, "window": 0, "tokens": 4, "kinds": sums_of(kinds, losses, off)}
        for name in "ab"
    ]
    (row,) = kinds_table([*rows, {"setting": "off"}], seed=0)
    assert row["lifted by a longer window (25.0% of tokens)"].startswith(f"{np.exp(-1.0):.3f}")
    assert row["copied from memory's part (25.0% of tokens)"].startswith(f"{np.exp(-0.5):.3f}")
    assert row["the rest (50.0% of tokens)"].startswith("1.000")


def test_nothing_told_apart_is_no_table() -> None:
    assert kinds_table([{"setting": "off"}], seed=0) == []
