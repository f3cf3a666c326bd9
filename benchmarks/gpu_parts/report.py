"""Rows as they come: on the screen, in Markdown and in JSON, written anew after each, so that a kill loses none."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.context import Context, Row

PACKAGES = ("torch", "transformers", "lightning", "peft", "faiss-cpu", "faiss-gpu", "triton")
HEAD = "| what | measured | unit | goal | met | note |\n|---|---|---|---|---|---|"


class Report:
    """Collects what is measured.

    Args:
        folder: Where ``gpu-CARD.md`` and ``.json`` go.
        facts: Card, versions and so on.
        keep: Keep the parts that are in the file: they were measured by an earlier call.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], keep: bool = False) -> None:
        name = "".join(c if c.isalnum() else "-" for c in facts["card"].lower()).strip("-")
        self.file = folder / f"gpu-{name}.json"
        self.facts = facts
        self.parts: dict[str, list[dict[str, Any]]] = {}
        if keep and self.file.exists():
            self.parts = json.loads(self.file.read_text())["parts"]
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def failed(self) -> bool:
        """Whether anything has failed."""
        return any(row["status"] == "failed" for rows in self.parts.values() for row in rows)

    def begin(self, part: str) -> None:
        """Measure a part, again if need be."""
        self.parts[part] = []

    def add(self, part: str, row: Row) -> None:
        """Note and print a row."""
        self.parts.setdefault(part, []).append(row.as_dict())
        print(f"[{part}] {line(row.as_dict())}", flush=True)
        self.write()

    def write(self) -> None:
        """Write both files."""
        kept = {"facts": self.facts, "parts": self.parts}
        self.file.write_text(json.dumps(kept, indent=1) + "\n")
        self.file.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        """The report as a page."""
        text = [f"# {self.facts['card']}\n", *(f"- {name}: {value}" for name, value in self.facts.items())]
        for part, rows in self.parts.items():
            text += [f"\n## {part}\n", HEAD, *map(line, rows)]
        return "\n".join(text) + "\n"


def line(row: dict[str, Any]) -> str:
    """A row of a table."""
    value = row["status"] if row["value"] is None else f"{number(row['value'])}"
    goal = "" if row["goal"] is None else f"{'<=' if row['most'] else '>='} {number(row['goal'])}"
    met = {None: "", True: "yes", False: "**no**"}[row["met"]]
    note = row["note"] if row["value"] is None or row["status"] == "measured" else f"{row['status']}; {row['note']}"
    return f"| {row['what']} | {value} | {row['unit']} | {goal} | {met} | {note.replace('|', '/')} |"


def number(value: float) -> str:
    """Four digits, and no power of ten where none is needed."""
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def facts(context: Context, minutes: float) -> dict[str, Any]:
    """Card, driver, versions, seed and commit."""
    card = torch.cuda.get_device_name() if context.cuda else "cpu"
    found: dict[str, Any] = {"card": card}
    if context.cuda:
        memory = torch.cuda.get_device_properties(context.device).total_memory / 1e9
        found["memory of the card [GB]"] = round(memory, 1)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["CUDA"] = torch.version.cuda
    found |= {name: _version(name) for name in PACKAGES}
    found |= {"Python": platform.python_version(), "processor threads": torch.get_num_threads()}
    # A machine that is lent may get the files without their history.
    commit = os.environ.get("MEMLONG_COMMIT") or _output(
        "git", "-C", str(context.root), "describe", "--always", "--dirty"
    )
    return found | {"commit": commit, "seed": context.seed, "minutes": minutes, "tiny": context.tiny}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not there"


def _output(*command: str) -> str:
    """What a command prints in its first line; the machine may not have it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"
