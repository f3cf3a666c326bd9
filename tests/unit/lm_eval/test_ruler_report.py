"""Tables and picture of RULER, from measurements made by hand."""

from typing import Any

import pytest

pytest.importorskip("lm_eval")
from lightning_memlong.evaluation import Measurement  # noqa: E402
from lightning_memlong.lm_eval.ruler_report import STAND_IN, report_ruler  # noqa: E402

NAME = "niah_single_2 (RULER-style)"


def measured(task: str, length: int, sample: int, setting: str, **found: Any) -> Measurement:
    made = {"prompt": length - 100, "memory": 512, "answers": 1, "tokens": 10, "nll": 5.0, "written": ""}
    key = {"task": task, "length": length, "sample": sample, "setting": setting}
    return key | made | {"score": 0.0, "right_tokens": 5, "beats_wrong": 1} | found


MEASURED = [
    measured("vt", 4096, 0, "off", score=0.2, right_tokens=2, beats_wrong=0, nll=20.0),
    measured("vt", 4096, 0, "on", score=1.0, right_tokens=9, needles=4, retrieved=1),
    measured("vt", 4096, 1, "off", score=0.0, right_tokens=1, beats_wrong=0, nll=30.0),
    measured("vt", 4096, 1, "on", score=0.6, right_tokens=6, needles=4, retrieved=4),
    measured("niah_single_2", 4096, 0, "off"),
    measured("niah_single_2", 4096, 0, "on", score=1.0),  # its needle stood in the window
    measured("vt", 16384, 0, "off"),
    measured("vt", 16384, 0, "on", score=0.4, needles=5, retrieved=0),
]


def test_tables() -> None:
    report = report_ruler("m", ["niah_single_2", "vt"], [4096, 16384], ["niah_single_2"], True, MEASURED)
    assert report.title == "RULER: m"
    assert report.notes[-1] == STAND_IN and report.notes[-2].startswith("RULER-style: ")
    assert report.tables["Score [%]"] == [
        {"tokens": "4,096", "memory": "off", "documents": "2", NAME: "0 (0..79)", "vt": "10 (0..72)", "mean": "5"},
        {"tokens": "4,096", "memory": "on", "documents": "2", NAME: "100 (21..100)", "vt": "80 (22..98)", "mean": "90"},
        # One of the tasks was not measured here, and a mean of the other would be held against means of both.
        {"tokens": "16,384", "memory": "off", "documents": "1", NAME: "", "vt": "0 (0..79)", "mean": ""},
        {"tokens": "16,384", "memory": "on", "documents": "1", NAME: "", "vt": "40 (4..92)", "mean": ""},
    ]
    assert [row["vt"] for row in report.tables["Answer tokens right [%]"]][:2] == ["15 (1..75)", "75 (20..97)"]
    assert [row["vt"] for row in report.tables["Likelier than a wrong answer [%]"]][:2] == [
        "0 (0..66)",
        "100 (34..100)",
    ]
    assert report.tables["Retrieved [%]"] == [
        {"tokens": "4,096", "memory": "on", "documents": "2", "vt": "62 (14..94)", "mean": "62"},
        {"tokens": "16,384", "memory": "on", "documents": "1", "vt": "0 (0..79)", "mean": "0"},
    ]
    (on,) = (r for r in report.data if (r["task"], r["tokens"], r["memory"]) == ("vt", 4096, "on"))
    assert (on["documents"], on["prompt_tokens"], on["nll_per_token"], on["retrieved"]) == (2, 3996, 0.5, 0.625)
    assert all(row.keys() == report.data[0].keys() for row in report.data)


def test_every_task_and_measure_has_a_panel() -> None:
    report = report_ruler("m", ["niah_single_2", "vt"], [4096, 16384], [], False, MEASURED)
    assert STAND_IN not in report.notes and not any("RULER-style" in note for note in report.notes)
    panels = report.figures["ruler"].axes
    assert [axes.get_title() for axes in panels[:2]] == ["niah_single_2", "vt"] and len(panels) == 4 * 2
    assert [text.get_text() for axes in panels for text in axes.texts] == ["cannot be told"]  # its retrieval
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == ["4k", "16k"]


def test_what_each_way_costs() -> None:
    """Medians over documents, and the mean of these over tasks."""
    found = [("vt", 0, 1.0), ("vt", 1, 3.0), ("vt", 2, 9.0), ("fwe", 0, 5.0)]
    rows = [measured(task, 4096, sample, "on", seconds=s, held=2e6 * s) for task, sample, s in found]
    rows.append(measured("vt", 4096, 0, "off", seconds=0.5, held=1e6))
    cost = report_ruler("m", ["vt", "fwe"], [4096], [], False, rows).tables["Cost"]
    assert cost == [
        {"tokens": "4,096", "memory": "on", "keys and values [MB]": "9", "time [s]": "4.0"},
        {"tokens": "4,096", "memory": "off", "keys and values [MB]": "1", "time [s]": "0.5"},
    ]


def test_without_retrieval_there_is_no_table_of_it() -> None:
    report = report_ruler("m", ["vt"], [4096], [], False, [r for r in MEASURED if r["setting"] == "off"])
    assert list(report.tables) == ["Score [%]", "Answer tokens right [%]", "Likelier than a wrong answer [%]"]
