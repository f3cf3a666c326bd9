"""Classification tasks: files, draws, label words."""

import random
from pathlib import Path

import pytest

from lightning_memlong.errors import UserError
from lightning_memlong.evaluation.demonstrations import demonstration_entries, demonstration_windows
from lightning_memlong.evaluation.labels import label_tokens
from lightning_memlong.evaluation.tasks import Example, balanced_sample, load_task


def test_both_forms_of_files(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('sentence\tlabel\ngood "film\t1\nbad film\t0\n')
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine\t1\n")
    train, asked = load_task("SST-2", str(tmp_path), "evaluation.tasks.SST-2")
    assert train == [Example('good "film', 1), Example("bad film", 0)] and asked == [Example("fine", 1)]
    other = tmp_path / "csv"
    other.mkdir()
    (other / "train.csv").write_text("".join(f'{i % 2},"text, {i}"\n' for i in range(20)))
    train, asked = load_task("MR", str(other), "evaluation.tasks.MR")
    assert len(train) == 16 and len(asked) == 4 and not set(train) & set(asked)
    assert {e.text for e in train + asked} == {f"text, {i}" for i in range(20)}


@pytest.mark.parametrize("content", ["2,x\n", "x\n", "1,\n", "a,b\n"])
def test_a_line_of_another_form_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.csv").write_text("0,fine\n" + content)
    with pytest.raises(UserError, match="line 2 of .*train.csv"):
        load_task("MR", str(tmp_path), "evaluation.tasks.MR")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="train.tsv .*or train.csv"):
            load_task("MR", str(folder), "evaluation.tasks.MR")


def test_draws_are_balanced_and_the_same_for_the_same_seed() -> None:
    examples = [Example(f"{i}", int(i % 10 == 0)) for i in range(100)]
    drawn = balanced_sample(examples, 8, 2, random.Random(1))
    assert len(set(drawn)) == 8 and sum(e.label for e in drawn) == 4
    assert (
        drawn == balanced_sample(examples, 8, 2, random.Random(1)) != balanced_sample(examples, 8, 2, random.Random(2))
    )
    assert sum(e.label for e in balanced_sample(examples, 40, 2, random.Random(1))) == 10, "as far as there are any"
    assert len(balanced_sample(examples, 5, 2, random.Random(1))) == 5


class Split:
    """A tokenizer of characters that joins what it is told to."""

    unk_token_id = 0

    def __init__(self, *joined: str) -> None:
        self.joined = joined

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        for number, piece in enumerate(self.joined):
            text = text.replace(piece, chr(1000 + number))
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, token: int) -> str:
        return chr(token)


def test_label_words_are_what_follows_the_cue() -> None:
    assert label_tokens("SST-2", Split()) == [[ord(c) for c in " negative"], [ord(c) for c in " positive"]]
    assert label_tokens("SST-2", Split(" negative", " positive")) == [[1000], [1001]]


@pytest.mark.parametrize("joined", [": n", "t: neg"])
def test_a_word_joined_with_the_cue_is_told(joined: str) -> None:
    with pytest.raises(UserError, match="evaluation.tasks.SST-2=.negative"):
        label_tokens("SST-2", Split(joined))


def test_demonstrations_become_entries() -> None:
    assert list(demonstration_windows([[1] * 5, [1] * 5, [1] * 30, [1] * 2], 12)) == [[0, 1], [2], [3]]
    assert demonstration_entries([5, 9, 4], 4) == ([0, 4, 5, 9, 13, 14], [4, 1, 4, 4, 1, 4], [0, 0, 1, 1, 1, 2])
