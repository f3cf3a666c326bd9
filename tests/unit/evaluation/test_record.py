"""Records of several processes beside each other, and what is measured by which part."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_memlong.errors import UserError
from lightning_memlong.evaluation import RecallProbes
from lightning_memlong.evaluation.parts import Part, open_record, units_of
from lightning_memlong.evaluation.record import Measurement, Record


def row(document: str, setting: str, nll: float = 1.0) -> Measurement:
    return {"document": document, "setting": setting, "nll": nll}


def write(file: Path, *rows: Measurement, more: str = "") -> None:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows) + more)


KEYS = ("document", "setting")


def test_what_other_processes_measured_is_known_and_left_as_it_is(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    write(mine, row("a", "off"), more='{"document": "a", "set')
    write(other, row("b", "off"), row("a", "off", 2.0), more='{"document": "b", "set')
    record = Record(mine, KEYS, [other, tmp_path / "nowhere.jsonl"])
    assert record.measurements == [row("a", "off"), row("b", "off")], "of two of the same, one's own"
    assert record.found == 2 and row("b", "off") in record and row("b", "on") not in record
    assert mine.read_text().count("\n") == 1 and mine.read_text().endswith("\n"), "the half-written line is dropped"
    assert other.read_text().endswith('"set'), "the other may still be writing it"
    record.add(row("b", "on"))
    record.add(row("b", "off"))
    assert len(mine.read_text().splitlines()) == 2 and len(record.measurements) == 3


def test_what_others_are_to_measure_is_left_out_until_it_is_there(tmp_path: Path) -> None:
    record = Record(tmp_path / "mine.jsonl", KEYS, elsewhere=[row("b", "off")])
    assert row("b", "off") in record and record.of([row("b", "off")]) == []
    record.add(row("b", "off"))
    assert record.measurements == [] and not record.file.exists()


def test_a_damaged_file_of_another_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="other.jsonl: measurements of an earlier run cannot be read"):
        Record(tmp_path / "mine.jsonl", KEYS, [tmp_path / "other.jsonl"])


def test_parts_share_out_all_and_nothing_twice(tmp_path: Path) -> None:
    evaluation: Any = RecallProbes(["pass_key"], [1024], [0.0, 0.5, 1.0], 2)
    planned = [{"kind": "pass_key", "length": 1024, "depth": d, "sample": s, "setting": w}
               for d in (0.0, 0.5, 1.0) for s in (0, 1) for w in ("off", "similarity")]  # fmt: skip
    evaluation.planned = lambda: planned
    assert list(units_of(evaluation).values()) == [0, 1, 2, 3, 4, 5]
    records = [open_record(tmp_path, evaluation, "abc", Part(n, 4)) for n in (1, 2, 3, 4)]
    mine = [[m for m in planned if m not in record] for record in records]
    assert [len(part) for part in mine] == [4, 4, 2, 2], "the six probes, each with both of its settings"
    assert sorted(map(str, (m for part in mine for m in part))) == sorted(map(str, planned))
    for record, part in zip(records, mine, strict=True):
        for measurement in part:
            record.add(measurement)
    assert [r.file.name for r in records[:1]] == ["recall-abc.part-1-of-4.jsonl"]
    whole = open_record(tmp_path, evaluation, "abc")
    assert whole.file.name == "recall-abc.jsonl" and whole.found == len(planned)
    assert open_record(tmp_path, evaluation, "other").found == 0
    again = open_record(tmp_path, evaluation, "abc", Part(1, 2))
    assert all(m in again for m in planned), "other parts than before know it too"


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "a/b", "-1/2"])
def test_what_is_no_part_is_told(text: str) -> None:
    with pytest.raises(UserError, match=f"part='{text}' cannot be used. Allowed: N/M"):
        Part.named(text)
