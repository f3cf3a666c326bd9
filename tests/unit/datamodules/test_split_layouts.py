"""Splits that names of folders and files say, in the layouts people have."""

from pathlib import Path

import pytest

from lightning_memlong.errors import UserError
from tests.unit.datamodules.layouts import opened, splits_of, tokens, write_all

LAYOUTS: dict[str, dict[str, list[str]]] = {
    "PG-19 as in its bucket": {
        "train": ["deepmind-gutenberg/train/1.txt", "deepmind-gutenberg/train/2.txt"],
        "validation": ["deepmind-gutenberg/validation/3.txt"],
        "test": ["deepmind-gutenberg/test/4.txt"],
        "": ["note.txt"],
    },
    "Proof-Pile-2": {
        "train": ["arxiv/train/a.jsonl.zst", "algebraic-stack/train/b.jsonl.zst", "web/train/c.jsonl"],
        "validation": ["arxiv/validation/a.jsonl.zst", "algebraic-stack/validation/b.jsonl.zst"],
        "test": ["arxiv/test/a.jsonl.zst"],
    },
    "the Pile": {
        "train": ["train/00.jsonl.zst", "train/01.jsonl.zst"],
        "validation": ["val.jsonl.zst"],
        "test": ["test.jsonl.zst"],
    },
    "capitals": {"train": ["Train/a.txt"], "validation": ["Validation/b.txt"], "test": ["TEST.txt"]},
    "aliases": {"train": ["training/a.txt"], "validation": ["eval/b.txt"]},
    "dev and eval": {"train": ["trainING_1.txt"], "validation": ["dev.txt"], "test": ["Eval-0.txt"]},
    "eval and test": {"train": ["train-2.txt"], "validation": ["evaluation.txt"], "test": ["testing/a.txt"]},
    "a hub clone": {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "validation": ["data/validation-00000-of-00001.parquet"],
        "test": ["data/test-00000-of-00001.parquet"],
        "": ["readme.txt", "docs/one.txt", "docs/two.txt", "docs/three.txt"],
    },
    "names that hold more": {
        "train": ["wiki.train.txt", "wiki.Train.part2.txt"],
        "validation": ["wiki.valid.txt"],
        "": ["licence.txt"],
    },
    "folders of mixed depth": {"train": ["x/train/a/b/1.txt", "x/train/2.txt"], "validation": ["x/valid/a/1.txt"]},
    "languages": {"train": ["en/train.jsonl", "de/train.jsonl"], "validation": ["en/dev.jsonl", "de/dev.jsonl"]},
    "no training": {"validation": ["validation.jsonl"], "test": ["test.jsonl"]},
    "plain names beside longer ones": {
        "train": ["books-train.txt"],
        "validation": ["val.txt"],
        "test": ["test.txt"],
    },
    "in doubt": {"train": ["train.txt"], "validation": ["val.txt"], "": ["train_test_mix.txt"]},
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_what_names_say(
    layout: str, cache: bool, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = LAYOUTS[layout]
    written = write_all(tmp_path, [name for names in files.values() for name in names])
    stages = [
        stage for stage, part in (("fit", "train"), ("validate", "validation"), ("test", "test")) if part in files
    ]
    found = splits_of(opened(tmp_path, tiny_backbone, cache=cache), *stages)
    told = capsys.readouterr().out
    assert found == {
        part: tokens(tiny_backbone, [t for name in names for t in written[name]])
        for part, names in files.items()
        if part
    }
    if "" in files:
        assert (
            f"{len(files[''])} ({', '.join(sorted(files['']))}) of {tmp_path} are in no split and are not read" in told
        )


UNUSED: dict[str, list[str]] = {
    "train alone": ["train.jsonl"],
    "shards of train alone": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    "a chunk of SlimPajama": ["train/chunk1/example_train_0.jsonl.zst", "train/chunk1/example_train_1.jsonl.zst"],
    "one book about a train": [*(f"{n}.txt" for n in range(8)), "the-train.txt", "on-test.txt"],
    "code": ["train.md", "test.md", *(f"src/{n}.txt" for n in range(8))],
}


@pytest.mark.parametrize("layout", UNUSED)
def test_names_of_splits_that_are_not_used_are_told(
    layout: str, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_all(tmp_path, UNUSED[layout], rows=12)
    for cache in (True, False):
        endings = [".txt", ".md", ".jsonl", ".jsonl.zst", ".parquet"]
        data = opened(tmp_path, tiny_backbone, cache=cache, extensions=endings,
                      validation_fraction=0.25)  # fmt: skip
        found = splits_of(data, "fit", "test")
        told = capsys.readouterr().out
        assert told.count("named like splits and not used as such") == 1
        assert sorted(sum(found.values(), [])) == tokens(tiny_backbone, sum(written.values(), []))
    assert not set(found["train"]) & (set(found["validation"]) | set(found["test"]))


def test_asking_for_folders_takes_names_however_few(tmp_path: Path, tiny_backbone: Path) -> None:
    written = write_all(tmp_path, [*(f"{n}.txt" for n in range(8)), "my-train.txt", "my-test.txt"])
    data = opened(tmp_path, tiny_backbone, split="folders")
    assert splits_of(data, "test") == {"test": tokens(tiny_backbone, written["my-test.txt"])}


def test_names_within_a_path_of_a_split_are_told(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path, ["all/train/a.txt", "all/test/b.txt", "held.txt"])
    path = {"train": str(tmp_path / "all"), "validation": str(tmp_path / "held.txt")}
    splits_of(opened(path, tiny_backbone))
    assert "1 (test/b.txt): named like other splits and read as train" in capsys.readouterr().out
    splits_of(opened(path, tiny_backbone, split="hash", validation_fraction=0.4))
    assert "named like splits and not used as such" in capsys.readouterr().out


def test_a_missing_split_is_told_before_any_is_tokenised(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path, ["train/a.txt", "test/b.txt"])
    with pytest.raises(UserError, match="no validation split. Allowed: train, test"):
        splits_of(opened(tmp_path, tiny_backbone))
    assert "tokens" not in capsys.readouterr().out


def test_splits_of_a_hub_data_set_have_aliases_too(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, written = ["configs:", "- config_name: default", "  data_files:"], {}
    for split in ("train", "dev", "odd"):
        written |= write_all(tmp_path, [f"d/{split}x.parquet"])
        lines.append(f"  - split: {split}\n    path: d/{split}x.parquet")
    (tmp_path / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    found = splits_of(opened(None, tiny_backbone, hub_id=str(tmp_path), cache=False))
    assert found == {
        "train": tokens(tiny_backbone, written["d/trainx.parquet"]),
        "validation": tokens(tiny_backbone, written["d/devx.parquet"]),
    }
    assert "not read: 1 (odd)" in capsys.readouterr().out


def test_every_run_says_how_much_is_in_each_split(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path, ["train/a.txt", "train/b.txt", "valid/c.txt"])
    splits_of(opened(tmp_path, tiny_backbone))
    told = capsys.readouterr().out
    assert "documents: train 2 (60 tokens)" in told and "documents: validation 1 (30 tokens)" in told
    live = opened(tmp_path, tiny_backbone, cache=False)
    live.setup("fit")
    for loader in (live.train_dataloader(), live.val_dataloader()):
        list(loader)
    live.teardown("fit")
    told = capsys.readouterr().out
    assert "train: 2 documents of 60 tokens in an epoch" in told and "validation: 1 documents of 30 tokens" in told
