"""Prompts answered about documents, as the command line does it: read or open a bank, answer, show, write down."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_memlong.bank import MemoryBank
from lightning_memlong.cli.checkpoints import on_device
from lightning_memlong.cli.console import console
from lightning_memlong.cli.runs import check_writable
from lightning_memlong.config import require
from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError
from lightning_memlong.generation import Conversation, Passage, Prompt
from lightning_memlong.generation.prefill import common_prefix
from lightning_memlong.memlong import MemLong


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


def ready(trainer: Any, module: Any, ckpt_path: str | None) -> MemLong:
    """The model of a run where and how it computes, with its memory settings.

    Args:
        trainer: Gives device, precision and memory settings.
        module: A MemLongModule.
        ckpt_path: Checkpoint whose weights it gets, if any.

    Raises:
        UserError: If memory is switched off, or the checkpoint does not belong to the model.
    """
    module, callback = on_device(trainer, module, ckpt_path)
    model: MemLong = module.model
    autocast = trainer.precision_plugin.forward_context
    model.use_memory(callback.config, module.tokenizer, callback.retrieval(module).retriever, autocast)
    return model


def documents(data: Any) -> Iterator[tuple[str, str]]:
    """Name and text of each document of a DataModule.

    Raises:
        UserError: If there is none, or one cannot be used.
    """
    allowed = "a text file, a folder of them, or an address"
    require(bool(data.path or data.hub_source.id), "data.path", data.path, allowed, "give --data.path book.txt")
    found = data.texts()
    first = next(found, None)
    require(first is not None, "data.path", data.path, "a source with a document that has text", "give another")
    yield from chain([first], found)


class Library:
    """Banks of documents: opened where there is a file of them, else read, and saved.

    Args:
        model: Reads.
        file: The file of the bank; None: it is kept nowhere.
        capacity: Size of a new bank [tokens]; None: everything.
        window: Tokens read at once [tokens].
        fallback: Where a bank without a file goes if reading is interrupted; None: nowhere.

    Raises:
        UserError: If the file's folder cannot be written.
    """

    def __init__(
        self,
        model: MemLong,
        file: str | None,
        capacity: int | None,
        window: int,
        fallback: Path | None,
    ) -> None:
        self._model, self._capacity, self._window, self._fallback = model, capacity, window, fallback
        self.file = None if file is None else Path(file)
        if self.file is not None:
            check_writable(self.file.absolute().parent, "bank")
        self.problem: UserError | None = None
        """Why the bank could not be saved."""

    def bank(self, name: str, text: str) -> MemoryBank:
        """The bank of a document; what of it is not in the file is read.

        Raises:
            UserError: If the file is of another document, or was made with something else.
            SystemExit: If reading was interrupted; what was read has been saved.
        """
        bank, tokens = None, self._model.long_context.tokenise(text)
        if self.file is not None and self.file.exists():
            bank = self._model.retrieval.open_bank(self.file, self._model.device, self._model.long_context.provenance())
            if common_prefix(bank, 0, tokens) is None:
                raise UserError(
                    f"bank={str(self.file)!r} holds another text than {name}. Allowed: a file made from it, or one "
                    "that does not exist yet. Fix: give another --bank for each document."
                )
            say(f"{name}: {int(bank.ends()[0]):,} tokens found in {self.file}", flush=True)
        before = 0 if bank is None else int(bank.ends()[0])
        bank = self._model.read_tokens([tokens], bank, window=self._window, capacity=self._capacity)
        self._told(name, bank)
        end = int(bank.ends()[0])
        if self.file is not None and end > before:
            self._save(bank, self.file)
        if end != len(tokens):
            self._stop(bank)
        return bank

    def _told(self, name: str, bank: MemoryBank) -> None:
        stats = bank.stats()
        gone = (
            f", {bank.evictions:,} of {bank.insertions:,} chunks evicted to stay within --capacity"
            if bank.evictions
            else ""
        )
        say(f"{name}: {stats['tokens']:,} tokens in memory ({stats['entries']:,} chunks){gone}", flush=True)

    def _save(self, bank: MemoryBank, file: Path) -> None:
        try:
            bank.save(file)
            say(f"Bank: {file} ({file.stat().st_size / 1e9:.2f} GB)", flush=True)
        except UserError as error:  # the answers are still to be had
            self.problem = error
            say(f"error: {error}", flush=True)

    def _stop(self, bank: MemoryBank) -> None:
        """Say how to go on, and end the command."""
        file = self.file or self._fallback
        if self.file is None and file is not None:
            self._save(bank, file)
        if file is not None and self.problem is None:
            more = "" if self.file else f" and --bank {file}"
            say(f"What was read is in {file}; go on with the same command{more}.")
        raise SystemExit(130)


def answers(
    model: MemLong,
    document: str,
    bank: MemoryBank,
    prompts: list[str],
    chat: bool | None,
    window: int,
    options: dict[str, Any],
) -> Iterator[Answer]:
    """Answer prompts about a document, each by itself; the bank stays as it is.

    Args:
        model: Writes.
        document: Its name.
        bank: The document's.
        prompts: What is asked.
        chat: Whether prompts are messages in the backbone's chat template; None: if it has one.
        window: Tokens of the local context [tokens].
        options: Of transformers' ``generate``.
    """
    whole = int(bank.ends()[0])
    for prompt in prompts:
        with Conversation(model.long_context, bank, window=window) as conversation:
            text = conversation.say(as_prompt(model, prompt, chat), **options)
            allowed = "options that give one text"
            require(
                isinstance(text, str), "generation", options, allowed, "leave num_return_sequences out, for instance"
            )
            yield Answer(document, prompt, text.strip(), conversation.passages, whole)


def as_prompt(model: MemLong, text: str, chat: bool | None) -> Prompt:
    """A prompt, or the message of a user where the backbone is to be chatted with."""
    template = bool(model.retrieval.tokenizer.chat_template)
    return [{"role": "user", "content": text}] if (template if chat is None else chat) else text


def place(passage: Passage, whole: int) -> str:
    """Where a passage stands, for people."""
    score = "" if passage.score != passage.score else f", similarity {passage.score:.2f}"
    if passage.start >= whole:
        return f"from this conversation{score}"
    return f"at {passage.start / max(whole, 1):.0%}, tokens {passage.start:,} to {passage.end:,}{score}"


def excerpt(passage: Passage, characters: int = 160) -> str:
    """The beginning of a passage on one line."""
    line = " ".join(passage.text.split())
    return line if len(line) <= characters else line[:characters].rsplit(" ", 1)[0] + " …"


def show(answer: Answer) -> None:
    """Print an answer with the passages it was written with."""
    out = console()
    out.print(f"\n[bold]{answer.document}[/bold]", highlight=False)
    out.print("> ", answer.prompt, sep="", markup=False, highlight=False)
    out.print(answer.text, markup=False, highlight=False, soft_wrap=True)
    show_passages(answer.passages, answer.tokens_read)


def show_passages(passages: list[Passage], whole: int) -> None:
    """Print where retrieved passages stand and how they begin."""
    out = console()
    for passage in passages:
        out.print(
            f"  retrieved {place(passage, whole)}: {excerpt(passage)}", style="dim", markup=False, highlight=False
        )


def write(folder: Path, answer: Answer) -> None:
    """Append an answer to ``answers.md``, and as a row to ``answers.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"## {answer.document}", "", f"**{answer.prompt}**", "", answer.text, ""]
    lines += [f"- retrieved {place(p, answer.tokens_read)}: {excerpt(p)}" for p in answer.passages]
    with (folder / "answers.md").open("a") as file:
        file.write("\n".join(lines) + "\n\n")
    row = asdict(answer)
    for passage in row["passages"]:
        passage["score"] = None if passage["score"] != passage["score"] else passage["score"]  # JSON knows no NaN
    with (folder / "answers.jsonl").open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
