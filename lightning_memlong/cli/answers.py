"""An answer about a document: how it is shown, and how it is written down."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_memlong.cli.console import wide_console
from lightning_memlong.distributed import say
from lightning_memlong.generation import Passage


@dataclass(frozen=True)
class Answer:
    """What was written after a prompt."""

    document: str
    prompt: str
    text: str
    passages: list[Passage]
    """What was retrieved for it, best first."""
    tokens_read: int
    """Length of the document [tokens]."""


def describe_place(passage: Passage, whole: int) -> str:
    """Where a passage stands, for people."""
    score = "" if passage.score != passage.score else f", similarity {passage.score:.2f}"
    if passage.start >= whole:
        return f"from this conversation{score}"
    return f"at {passage.start / max(whole, 1):.0%}, tokens {passage.start:,} to {passage.end:,}{score}"


def excerpt(passage: Passage, characters: int = 160) -> str:
    """The beginning of a passage on one line."""
    line = " ".join(passage.text.split())
    return line if len(line) <= characters else line[:characters].rsplit(" ", 1)[0] + " …"


def show_answer(answer: Answer) -> None:
    """Print an answer; beside it, on stderr, what it answers and the passages it was written with."""
    out = wide_console(beside=True)
    out.print(f"\n{answer.document}", style="bold", markup=False, highlight=False)
    out.print("> ", answer.prompt, sep="", markup=False, highlight=False)
    say(answer.text, flush=True)
    show_passages(answer.passages, answer.tokens_read)


def show_passages(passages: list[Passage], whole: int) -> None:
    """Print, on stderr, where retrieved passages stand and how they begin."""
    out = wide_console(beside=True)
    for passage in passages:
        out.print(
            f"  retrieved {describe_place(passage, whole)}: {excerpt(passage)}",
            style="dim",
            markup=False,
            highlight=False,
        )


def write_answer(folder: Path, answer: Answer) -> None:
    """Append an answer to ``answers.md``, and as a row to ``answers.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"## {answer.document}", "", f"**{answer.prompt}**", "", answer.text, ""]
    lines += [f"- retrieved {describe_place(p, answer.tokens_read)}: {excerpt(p)}" for p in answer.passages]
    with (folder / "answers.md").open("a") as file:
        file.write("\n".join(lines) + "\n\n")
    row = asdict(answer)
    for passage in row["passages"]:
        passage["score"] = None if passage["score"] != passage["score"] else passage["score"]  # JSON knows no NaN
    with (folder / "answers.jsonl").open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
