"""Random folders, names, links and formats: each document in one split, none twice, none lost without being counted."""

import re
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given, settings

from datamodules import PG19
from datamodules.resolve_source import resolve_source
from datamodules.splits import by_hash
from lightning_memlong.errors import UserError
from tests.unit.datamodules.layouts import text, write

FOLDERS = ["train", "Validation", "test", "valid", "x", "y [z]", "a*", ".hidden", "deep", "eval"]
STEMS = ["train", "val-00000-of-00002", "TEST", "1", "book", "wiki.train", "on-test", ".dot", "a b", "é"]
ENDINGS = [".txt", ".jsonl", ".parquet", ".TXT", ".jsonl.gz", ".txt.zst", ".ndjson", ".bin"]
files = st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=3), st.sampled_from(STEMS), st.sampled_from(ENDINGS))
links = st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=2), st.integers(0, 30), st.booleans())


def counted(told: str, after: str) -> int:
    """The number that a line of the output gives of something."""
    found = re.search(rf"(\d+) (\([^()]*(\[[^]]*\])?[^()]*\) )?{after}", told)
    return int(found[1]) if found else 0


def build(root: Path, tree: list[tuple[list[str], str, str]], more: list[tuple[list[str], int, bool]]) -> Counter[str]:
    """Write a tree; gives the documents in files that are to be read."""
    expected: Counter[str] = Counter()
    for number, (folders, stem, ending) in enumerate(tree):
        name = "/".join([*folders, stem + ending])
        if (root / name).exists():
            continue
        texts = [text(100 * number + row) for row in range(1 if ".txt" in ending.lower() or ending == ".bin" else 2)]
        write(root, name, texts)
        if ending != ".bin" and not any(part.startswith(".") for part in Path(name).parts):
            expected.update(texts)
    paths = sorted(path for path in root.rglob("*") if not path.is_symlink())
    for number, (folders, which, broken) in enumerate(more):
        at = root.joinpath(*folders, f"link{number}")
        at.parent.mkdir(parents=True, exist_ok=True)
        target = Path("/nowhere") if broken or not paths else paths[which % len(paths)]
        if target.is_dir() or broken:  # a linked file has the ending of its target
            at.symlink_to(target)
        elif paths:
            at.with_name(at.name + "".join(target.suffixes[-2:])).symlink_to(target)
    return expected


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.lists(files, min_size=1, max_size=14), st.lists(links, max_size=4), st.sampled_from(["auto", "hash", "folders"])
)
def test_each_document_is_in_one_split_and_none_is_lost_in_silence(
    tree: list[tuple[list[str], str, str]], more: list[tuple[list[str], int, bool]], split: str
) -> None:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as output:
        root = Path(folder) / "root"
        expected = build(root, tree, more)
        data = PG19(path=str(root), split=split, chunk_size=16, window=32)  # type: ignore[arg-type]
        try:
            source = resolve_source(data.settings, data)
        except UserError as error:
            assert "holds no text" in str(error) or (split == "folders" and "neither folders nor" in str(error))
            return
        read = {role: [d for i in range(len(shards)) for d in data.documents(shards, i)]
                for role, shards in source.shards.items()}  # fmt: skip
        outside = counted(output.getvalue(), r"of .* are in no split")
    told = output.getvalue()
    assert not [d for documents in read.values() for d in documents if d.problem]
    texts = Counter(d.text for documents in read.values() for d in documents)
    assert max(texts.values()) == 1, "none twice"
    lost = expected - texts
    assert texts - expected == Counter() or any(not broken for _, _, broken in more), "what a link shows may be hidden"
    assert bool(lost) <= bool(outside) and len(lost) <= 2 * outside, told
    if source.undivided:
        documents = read["all"]
        with redirect_stdout(StringIO()):
            parts = by_hash([d.id for d in documents], [d.digest() for d in documents], 0.2)
        held = {*parts["validation"], *parts["test"]}  # of a handful of documents both are the same
        assert {*parts["train"], *held} == set(range(len(documents))) and not held & set(parts["train"])
    assert all("link" in name for name in broken_links(told))


def broken_links(told: str) -> list[str]:
    """Names of the broken links that were told."""
    found = re.search(r"\d+ \(([^)]*)\) links to nothing", told)
    return found[1].split(", ") if found else []
