"""A file or folder of text; by default the sources of Python's standard library, present on every machine."""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.documents import DocumentDataModule
from datamodules.token_cache import Document
from lightning_memlong.config import require, require_choice
from lightning_memlong.errors import UserError

SPLITS = ("train", "validation", "test")
Split = Literal["auto", "hash", "folders", "all"]


class LocalText(DocumentDataModule):
    """Text files, one document each, split into train, validation and test.

    Args:
        path: File or folder, read recursively; null: the Python standard library's own sources.
        extensions: Endings of files that are read.
        split: How documents become splits: ``folders`` by their top folder (train, validation, test), ``hash`` by
            a stable hash of their path, ``all`` puts every document in validation and test (evaluation only),
            ``auto`` takes folders if there are such, else the hash.
        validation_fraction: Share of documents the hash gives to validation, and the same again to test.
        **kwargs: See :class:`DocumentDataModule`.
    """

    name = "local-text"

    def __init__(
        self,
        path: str | None = None,
        extensions: tuple[str, ...] = (".txt", ".md", ".tex", ".py"),
        split: Split = "auto",
        validation_fraction: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_choice("data.split", split, Split)
        allowed = "above 0 and below 0.5"
        ok = 0 < validation_fraction < 0.5
        require(ok, "data.validation_fraction", validation_fraction, allowed, "for all documents use --data.split all")
        self.path, self.extensions, self.how = path, tuple(extensions), split
        self.validation_fraction = validation_fraction

    def read_documents(self) -> list[Document]:
        """Every file with one of the endings, sorted by path.

        Raises:
            UserError: If the path does not exist, holds no such file, or a file is not readable UTF-8 text.
        """
        root = Path(self.path) if self.path else Path(sysconfig.get_paths()["stdlib"])
        if not root.exists():
            raise UserError(f"data.path={str(root)!r} does not exist. Allowed: a file or a folder. Fix: correct it.")
        if root.is_file():
            return [Document(root.name, _read(root))]
        files = sorted(f for f in root.rglob("*") if self._wanted(f.relative_to(root)) and f.is_file())
        documents = [Document(str(f.relative_to(root)), _read(f)) for f in files]
        if not documents:
            raise UserError(
                f"data.path={str(root)!r} holds no text. Allowed: files ending in {', '.join(self.extensions)}. "
                "Fix: correct the path, or name other endings with --data.extensions."
            )
        return documents

    def _wanted(self, file: Path) -> bool:
        if file.suffix.lower() not in self.extensions:
            return False
        # Installed packages and test suites differ from machine to machine; the library itself does not.
        return bool(self.path) or not {"site-packages", "dist-packages", "test", "tests"} & set(file.parts)

    def split(self, documents: Sequence[str], stage: str) -> dict[str, list[int]]:
        """Assign documents; a document keeps its split when others come or go."""
        top = [Path(d).parts[0] for d in documents]
        if self.how == "folders" or (self.how == "auto" and {"train", "validation"} <= set(top)):
            parts = {s: [i for i, folder in enumerate(top) if folder == s] for s in SPLITS}
        elif self.how == "all":
            everything = list(range(len(documents)))
            parts = {"train": [], "validation": everything, "test": everything}
        else:
            parts = self._by_hash(documents)
        self._require(parts, stage, len(documents))
        return parts

    def _by_hash(self, documents: Sequence[str]) -> dict[str, list[int]]:
        marks = [int(hashlib.sha256(d.encode()).hexdigest()[:12], 16) / 16**12 for d in documents]
        f = self.validation_fraction
        parts: dict[str, list[int]] = {s: [] for s in SPLITS}
        for i, mark in enumerate(marks):
            parts["validation" if mark < f else "test" if mark < 2 * f else "train"].append(i)
        self._fill(parts, sorted(range(len(marks)), key=marks.__getitem__), documents)
        return parts

    @staticmethod
    def _fill(parts: dict[str, list[int]], ranked: list[int], documents: Sequence[str]) -> None:
        """Give empty splits a document: a handful rarely fills all three. What is shared is never shared with train."""
        for part, other in (("validation", "test"), ("test", "validation")):
            if parts[part]:
                continue
            free = [i for i in ranked if i in parts["train"]]
            if len(free) > 1 or (free and not parts[other]):
                parts[part] = free[:1]
                parts["train"].remove(free[0])
            else:
                parts[part] = list(parts[other])
            names = ", ".join(documents[i] for i in parts[part])
            print(f"Data: too few documents for a {part} split by hash; it gets {names}", flush=True)
        if not parts["train"] and parts["test"] != parts["validation"]:
            parts["train"], parts["test"] = parts["test"], list(parts["validation"])

    def _require(self, parts: dict[str, list[int]], stage: str, count: int) -> None:
        needed = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}.get(stage, ())
        empty = [s for s in needed if not parts[s]]
        shared = stage == "fit" and set(parts["train"]) & (set(parts["validation"]) | set(parts["test"]))
        if empty or shared:
            raise UserError(
                f"data.split={self.how!r}: {count} documents leave no {' and no '.join(empty or ['separate test'])} "
                f"split. Allowed: for fit, at least one document for each of {', '.join(needed)}. Fix: add documents, "
                "sort them into folders train/ and validation/, or lower data.min_document_tokens."
            )


def _read(file: Path) -> str:
    try:
        data = file.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.path: {file} cannot be read as text ({error}). Allowed: readable UTF-8 files. "
            "Fix: convert or remove it, or leave its ending out of --data.extensions."
        ) from error
    if "\x00" in text:
        raise UserError(
            f"data.path: {file} is a binary file (it holds a zero byte). Allowed: UTF-8 text. Fix: remove it, or "
            "leave its ending out of --data.extensions."
        )
    return text
