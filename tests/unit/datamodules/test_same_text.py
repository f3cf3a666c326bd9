"""Links, hidden and broken files, and the same text twice."""

from pathlib import Path

import pytest

from lightning_memlong.errors import UserError
from tests.server import Server
from tests.unit.datamodules.layouts import opened, read_all, splits_of, text, tokens, write, write_all


def link(at: Path, target: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(target, target_is_directory=target.is_dir())


def test_links_are_followed_and_what_is_passed_over_is_told_once(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, apart = tmp_path / "root", tmp_path / "apart"
    written = write_all(root, ["1.txt", "in/2.txt", "z/3.jsonl"]) | write_all(apart, ["4.txt", "deep/5.txt"])
    link(root / "linked", apart)
    link(root / "linked.txt", apart / "4.txt")  # twice
    link(apart / "back", root)  # round in a circle
    link(root / "a", root / "in")  # before its target in the order of names
    link(root / "1-again.txt", root / "1.txt")
    link(root / "annexed.txt", tmp_path / "nowhere")
    write_all(root, [".hidden.txt", ".git/config.txt", "table.bin", "picture.png"])
    expected = tokens(tiny_backbone, sum(written.values(), []))
    assert read_all(root, tiny_backbone) == expected
    told = capsys.readouterr().out
    assert told.count("not read of") == 1
    for words in ("1 (annexed.txt) links to nothing", "2 (.git/, .hidden.txt) hidden", "2 of other endings",
                  "4 (a/, linked/back/, 1-again.txt, linked/4.txt) the same as others"):  # fmt: skip
        assert words in told, words
    link(tmp_path / "whole", root)
    assert read_all(tmp_path / "whole", tiny_backbone) == expected
    with pytest.raises(UserError, match="annexed.txt' is a link to nothing"):
        read_all(root / "annexed.txt", tiny_backbone)
    with pytest.raises(UserError, match=r"holds no text \(not read: 1 .x.txt. links to nothing"):
        link(tmp_path / "annex" / "x.txt", tmp_path / "nowhere")
        read_all(tmp_path / "annex", tiny_backbone)


@pytest.mark.parametrize("name", ["books [1900]", "what?", "a*b", "[train]"])
def test_a_folder_that_is_there_is_no_glob(name: str, tmp_path: Path, tiny_backbone: Path, server: Server) -> None:
    written = write_all(tmp_path / name, ["1.txt", "sub/2.txt"])
    write_all(tmp_path / name, ["metadata.bin"])
    expected = tokens(tiny_backbone, sum(written.values(), []))
    assert read_all(tmp_path / name, tiny_backbone) == expected
    assert read_all(tmp_path / name / "1.txt", tiny_backbone) == tokens(tiny_backbone, written["1.txt"])


def test_what_is_hidden_on_a_server_is_passed_over_too(
    tmp_path: Path, tiny_backbone: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_all(tmp_path, ["1.txt", "a/2.txt"])
    write_all(tmp_path, [".git/x.txt", ".y.txt"])
    assert read_all(server.serve(tmp_path), tiny_backbone) == tokens(tiny_backbone, sum(written.values(), []))
    assert "2 (.git/x.txt, .y.txt) hidden" in capsys.readouterr().out


def test_a_file_is_read_once(tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_all(tmp_path, ["x.txt", "y.jsonl", "z.txt"])
    for name in ("x.txt.gz", "y.jsonl.zst"):
        write(tmp_path, name, written[name.rpartition(".")[0]])
    other = [text(999)]
    write(tmp_path, "z.txt.gz", other)  # of the same name, with another text
    everything = tokens(tiny_backbone, [*sum(written.values(), []), *other])
    paths = [str(tmp_path), f"{tmp_path}/../{tmp_path.name}", str(tmp_path / "x.txt")]
    assert read_all(paths, tiny_backbone) == read_all(tmp_path, tiny_backbone) == everything
    assert "2 (x.txt.gz, y.jsonl.zst) the same as others" in capsys.readouterr().out
    path = {"train": str(tmp_path), "validation": str(tmp_path / "x.txt")}
    found = splits_of(opened(path, tiny_backbone, split="hash", validation_fraction=0.3), "fit", "test")
    assert sorted(sum(found.values(), [])) == everything


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst"])
def test_a_damaged_copy_is_told_and_not_taken_for_the_same(name: str, tmp_path: Path, tiny_backbone: Path) -> None:
    written = write_all(tmp_path, ["x.txt"])["x.txt"]
    write(tmp_path, name, written)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-12])
    with pytest.raises(UserError, match=f"{name} .*cannot be read"):
        read_all(tmp_path, tiny_backbone)
    assert read_all(tmp_path, tiny_backbone, on_bad_document="skip") == tokens(tiny_backbone, written)


def test_a_link_between_splits_is_on_one_side(tmp_path: Path, tiny_backbone: Path) -> None:
    written = write_all(tmp_path, ["train/a.txt", "test/b.txt", "valid/c.txt"])
    link(tmp_path / "train" / "b.txt", tmp_path / "test" / "b.txt")
    assert splits_of(opened(tmp_path, tiny_backbone), "fit", "test") == {
        "train": tokens(tiny_backbone, written["train/a.txt"]),
        "validation": tokens(tiny_backbone, written["valid/c.txt"]),
        "test": tokens(tiny_backbone, written["test/b.txt"]),
    }


@pytest.mark.parametrize("cache", [True, False])
def test_equal_texts_are_on_one_side_of_a_hash(
    cache: bool, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And wherever they lie: by their texts, not their names."""
    for i in range(30):
        for copy in range(3):
            write(tmp_path, f"x/{copy}/{i}.txt", [text(i)])
        write(tmp_path, f"y/{i + 100}.txt", [text(i)])
    found = splits_of(opened(tmp_path / "x", tiny_backbone, validation_fraction=0.2, cache=cache), "fit", "test")
    sides = {part: sorted(set(documents)) for part, documents in found.items()}
    assert all(sides.values()) and sorted(sum(sides.values(), [])) == tokens(
        tiny_backbone, [text(i) for i in range(30)]
    )
    assert sum(map(len, found.values())) == 90
    assert ("equal to other documents of it" in capsys.readouterr().out) is cache
    elsewhere = splits_of(
        opened(tmp_path / "y", tiny_backbone, validation_fraction=0.2, cache=not cache), "fit", "test"
    )
    assert elsewhere == sides


@pytest.mark.parametrize("cache", [True, False])
def test_training_leaves_out_what_another_split_holds(
    cache: bool, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole files and rows, also where test is never opened."""
    for part, numbers in (("train", (0, 1, 2, 3)), ("validation", (1, 4))):
        for i in numbers:
            write(tmp_path, f"{part}/{i}.txt", [text(i)])
    write(tmp_path, "test/rows.jsonl", [text(2), text(6)])
    write(tmp_path, "train/rows.jsonl", [text(4), text(5), text(6)])
    data = opened(tmp_path, tiny_backbone, cache=cache)
    assert splits_of(data, "fit")["train"] == tokens(tiny_backbone, [text(0), text(3), text(5)])
    data.teardown("fit")
    said = capsys.readouterr().out
    if cache:
        names = "4 (train/1.txt, train/2.txt, train/rows.jsonl:1, train/rows.jsonl:3)"
        assert f"{names} of train also in another split and not trained on" in said
    else:
        assert "train/1.txt of train also in another split and not trained on; others are not named" in said
        assert "4 that are also in another split" in said
    found = splits_of(opened(tmp_path, tiny_backbone, cache=cache), "fit", "test")
    assert found["validation"] == tokens(tiny_backbone, [text(1), text(4)])
    assert found["test"] == tokens(tiny_backbone, [text(2), text(6)])


def test_a_split_that_cannot_be_read_is_not_looked_for(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "validation"):
        write(tmp_path, f"{part}/a.jsonl", [text(len(part))])
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.jsonl").write_text('{"content": "x"}\n')
    found = splits_of(opened(tmp_path, tiny_backbone))
    assert found["train"] == tokens(tiny_backbone, [text(5)])
    assert "documents of test are not looked for in train: data.text_column" in capsys.readouterr().out


@pytest.mark.parametrize("cache", [True, False])
def test_splits_that_are_given_one_by_one_stay_as_they_are(
    cache: bool, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "validation"):
        write(tmp_path, f"{part}/a.txt", [text(0)])
    path = {part: str(tmp_path / part) for part in ("train", "validation")}
    found = splits_of(opened(path, tiny_backbone, cache=cache))
    assert found["train"] == found["validation"] == tokens(tiny_backbone, [text(0)])
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "that is how data.path names them" in said
    alone = opened(tmp_path, tiny_backbone, cache=cache)
    with pytest.raises(UserError, match="also in another split"):
        alone.setup("fit")
        list(alone.train_dataloader())
