"""Classification tasks of the paper (section 4): from local files, or from the hub."""

import csv
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_memlong.config import require
from lightning_memlong.errors import UserError


@dataclass(frozen=True)
class Task:
    """What a task asks."""

    words: tuple[str, ...]
    """The word of each label, in the order of label numbers."""
    hub: str
    """Data set of the hub."""
    text: str = "text"
    """Its column of texts; ``label`` has the numbers."""
    names: tuple[str, ...] = ()
    """Of each label, what a column ``label_text`` calls it, where numbers are not to be relied on."""
    template: str = "Review: {} Sentiment:"
    """Text and cue; the word follows after a space, and after it a full stop. As the reference code has it."""


_SENTIMENT = ("negative", "positive")
TASKS = {
    "SST-2": Task(_SENTIMENT, "stanfordnlp/sst2", "sentence"),
    "MR": Task(_SENTIMENT, "cornell-movie-review-data/rotten_tomatoes"),
    "Subj": Task(("subjective", "objective"), "SetFit/subj", names=("subjective", "objective"),
                 template="Input: {} Type:"),
    "SST-5": Task(("terrible", "bad", "okay", "good", "great"), "SetFit/sst5"),
    "MPQA": Task(_SENTIMENT, "jxm/mpqa", "sentence"),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A text and the number of its label."""

    text: str
    label: int


def load_task(name: str, folder: str | None, key: str) -> tuple[list[Example], list[Example]]:
    """Examples to draw demonstrations from, and examples to be asked.

    Of a folder, ``train`` is the former; ``test`` (else ``dev``) the latter, and where there is neither, a fifth of
    train, which is then not in the former. Files are ``.tsv`` with a header (sentence, label) or ``.csv`` without
    (label, sentence).

    Args:
        name: Of :data:`TASKS`.
        folder: Folder of the task's files; None: the hub.
        key: The setting, for messages.

    Raises:
        UserError: If it is not there, or its files are not of that form.
    """
    task = TASKS[name]
    parts = _from_hub(task, key) if folder is None else _from_folder(Path(folder), len(task.words), key)
    train = parts.get("train", [])
    asked = parts.get("test") or parts.get("dev") or parts.get("validation")
    require(bool(train), key, folder, "a task with training examples", "add a file train.tsv or train.csv")
    if not asked:
        mixed = random.Random(0).sample(train, len(train))
        fifth = max(1, len(mixed) // 5)
        train, asked = mixed[fifth:], mixed[:fifth]
    return train, asked


def _from_folder(folder: Path, labels: int, key: str) -> dict[str, list[Example]]:
    files = {f.stem: f for f in sorted(folder.glob("*")) if f.suffix in (".csv", ".tsv")} if folder.is_dir() else {}
    allowed = "a folder with train.tsv (sentence, label; a header) or train.csv (label, sentence; no header)"
    require("train" in files, key, str(folder), allowed, "correct the path; null takes the hub's")
    return {part: _read(file, labels, key) for part, file in files.items()}


def _read(file: Path, labels: int, key: str) -> list[Example]:
    tabs = file.suffix == ".tsv"
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{key}: {file} cannot be read ({error}). Allowed: UTF-8 text. Fix: repair it.") from error
    examples = []
    for number, row in enumerate(rows[1:] if tabs else rows, 2 if tabs else 1):
        text, label = (row if tabs else row[::-1]) if len(row) == 2 else ("", "")
        if not text.strip() or not label.strip().isdigit() or int(label) >= labels:
            raise UserError(
                f"{key}: line {number} of {file} is {row!r}. Allowed: "
                f"{'sentence<TAB>label' if tabs else 'label,sentence'}, a label from 0 to {labels - 1}. Fix: repair it."
            )
        examples.append(Example(text.strip(), int(label)))
    return examples


def _from_hub(task: Task, key: str) -> dict[str, list[Example]]:
    from datasets import load_dataset

    try:
        return {
            part: [Example(str(row[task.text]).strip(), _label(row, task)) for row in rows if row["label"] >= 0]
            for part, rows in load_dataset(task.hub).items()
        }
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {task.hub} cannot be loaded from the hub ({type(error).__name__}: {text}). Allowed: a data set "
            f"that this machine can reach, with columns {task.text} and label. Fix: check the network, or give a "
            f"folder of its files as --{key}."
        ) from error


def _label(row: Mapping[str, Any], task: Task) -> int:
    if task.names and row.get("label_text") in task.names:
        return task.names.index(row["label_text"])
    return int(row["label"])


def balanced_sample(examples: list[Example], count: int, labels: int, mixer: random.Random) -> list[Example]:
    """So many examples, equally many of each label as far as that goes; so are the first few of them."""
    by_label = [
        mixer.sample(same, len(same)) for same in ([e for e in examples if e.label == n] for n in range(labels))
    ]
    # Turn by turn, so that the first few are as balanced as all of them.
    return [e for turn in range(max(map(len, by_label), default=0)) for e in _turn(by_label, turn, mixer)][:count]


def _turn(by_label: list[list[Example]], turn: int, mixer: random.Random) -> list[Example]:
    found = [same[turn] for same in by_label if turn < len(same)]
    return mixer.sample(found, len(found))
