"""Text as people have it: layouts are written, and read, for comparing document by document."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from datamodules import PG19, DocumentDataModule
from lightning_memlong.backbone import load_tokenizer
from tests.conftest import WORDS

Written = dict[str, list[str]]
"""Of each file, its documents."""

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def text(seed: int, words: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(root: Path, name: str, texts: list[str]) -> None:
    """A file in the format its name says."""
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    plain, _, packed = name.lower().rpartition(".") if name.endswith((".gz", ".zst")) else (name.lower(), "", "")
    if plain.endswith((".jsonl", ".ndjson", ".jsonlines")):
        data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    elif plain.endswith(".parquet"):
        return pq.write_table(pa.table({"text": texts}), file)
    else:
        data = "".join(texts).encode()
    file.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(packed, bytes)(data))


def write_all(root: Path, names: list[str], rows: int = 3) -> Written:
    """Files of different documents: one of a text file, else a few rows."""
    written = {}
    for i, name in enumerate(names):
        count = rows if any(f".{end}" in name.lower() for end in ("jsonl", "parquet", "ndjson")) else 1
        written[name] = [text(100 * i + row) for row in range(count)]
        write(root, name, written[name])
    return written


def opened(path: object, backbone: Path, **more: Any) -> DocumentDataModule:
    place = str(path) if isinstance(path, Path) else path
    base: dict[str, Any] = {"path": place, "tokenizer": str(backbone), "chunk_size": 16, "window": 32, "num_workers": 0}
    base |= {"cache": True, "shuffle": False} | more
    return more.get("kind", PG19)(**{key: value for key, value in base.items() if key != "kind"})


def splits_of(data: DocumentDataModule, *stages: str) -> dict[str, list[tuple[int, ...]]]:
    """Of each split, the tokens of its documents, sorted."""
    for stage in stages or ("fit",):
        data.setup(stage)
    return {part: sorted(tuple(t.tolist()) for _, t in data.whole_documents(part)) for part in data.streams}


def tokens(backbone: Path, texts: list[str]) -> list[tuple[int, ...]]:
    return sorted(tuple(ids) for ids in load_tokenizer(str(backbone))(texts, add_special_tokens=False)["input_ids"])


def read_all(path: object, backbone: Path, **more: Any) -> list[tuple[int, ...]]:
    return splits_of(opened(path, backbone, split="all", **more), "validate")["validation"]
