"""``train.py predict``: a bank of each document, read or opened, and prompts answered with it."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_memlong.bank import MemoryBank
from lightning_memlong.cli.answers import Answer, show_answer, write_answer
from lightning_memlong.cli.checkpoints import on_device
from lightning_memlong.cli.run_folders import begin_run, check_writable
from lightning_memlong.cli.run_record import note_settings
from lightning_memlong.config import require
from lightning_memlong.distributed import note
from lightning_memlong.errors import UserError
from lightning_memlong.generation import Conversation, Prompt
from lightning_memlong.generation.prefill import common_prefix
from lightning_memlong.memlong import MemLong


def load_for_inference(trainer: Any, module: Any, ckpt_path: str | None) -> MemLong:
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
    model.use_memory(callback.config, module.tokenizer, callback.retrieval(module).retriever)
    model.autocast = trainer.precision_plugin.forward_context
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


class DocumentBanks:
    """Banks of documents: opened where there is a file of them, else read, and saved.

    Args:
        model: Reads.
        file: The file of the bank; None: it is kept nowhere.
        capacity: Size of a new bank [tokens]; None: everything.
        window: Tokens read at once [tokens].
        fallback: Gives where a bank without a file goes if reading is interrupted; None: nowhere.

    Raises:
        UserError: If the file's folder cannot be written.
    """

    def __init__(
        self,
        model: MemLong,
        file: str | None,
        capacity: int | None,
        window: int,
        fallback: Callable[[], Path] | None,
    ) -> None:
        self._model, self._capacity, self._window, self._fallback = model, capacity, window, fallback
        self.file = None if file is None else Path(file)
        if self.file is not None:
            allowed, fix = "a file, there or yet to be written", f"use {self.file / 'bank.safetensors'}"
            require(not self.file.is_dir(), "bank", file, allowed, fix)
            check_writable(self.file.absolute().parent, "bank")
        self.problem: UserError | None = None
        """Why the bank could not be saved."""

    def open_or_read(self, name: str, text: str) -> MemoryBank:
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
            note(f"{name}: {int(bank.ends()[0]):,} tokens found in {self.file}")
        before = 0 if bank is None else int(bank.ends()[0])
        bank = self._model.read_tokens([tokens], bank, window=self._window, capacity=self._capacity)
        self._show_size(name, bank)
        end = int(bank.ends()[0])
        if self.file is not None and end > before:
            self._save(bank, self.file)
        if end != len(tokens):
            self._end_interrupted(bank)
        return bank

    def _show_size(self, name: str, bank: MemoryBank) -> None:
        stats = bank.stats()
        gone = (
            f", {bank.evictions:,} of {bank.insertions:,} chunks evicted to stay within --capacity"
            if bank.evictions
            else ""
        )
        note(f"{name}: {stats['tokens']:,} tokens in memory ({stats['entries']:,} chunks){gone}")

    def _save(self, bank: MemoryBank, file: Path) -> None:
        try:
            bank.save(file)
            note(f"Bank: {file} ({file.stat().st_size / 1e9:.2f} GB)")
        except UserError as error:  # the answers are still to be had
            self.problem = error
            note(f"error: {error}")

    def _end_interrupted(self, bank: MemoryBank) -> None:
        """Say how to go on, and end the command."""
        file = self.file
        if file is None and self._fallback is not None:
            file = self._fallback()
            self._save(bank, file)
        if file is not None and self.problem is None:
            more = "" if self.file else f" and --bank {file}"
            note(f"What was read is in {file}; go on with the same command{more}.")
        raise SystemExit(130)


def refuse_what_is_known(model: MemLong, window: int, prompts: list[Prompt], options: dict[str, Any]) -> None:
    """Refuse prompts and options of ``generate`` that cannot be used, before a document is read for them.

    Args:
        model: Will write.
        window: Tokens of the local context [tokens].
        prompts: What will be asked.
        options: Of transformers' ``generate``.

    Raises:
        UserError: If one cannot.
    """
    one = options.get("num_return_sequences", 1) == 1 and not options.get("return_dict_in_generate")
    fix = "leave num_return_sequences and return_dict_in_generate out"
    require(one, "generation", options, "options that give one text", fix)
    Conversation(model.long_context, window=window).check(prompts, options)


def read_one(
    trainer: Any,
    module: Any,
    data: Any,
    ckpt_path: str | None,
    file: str | None,
    capacity: int | None,
    options: dict[str, Any],
) -> tuple[str, MemLong, MemoryBank]:
    """Name of the one document of a DataModule, the model that has read it, and the bank it was read into.

    Args:
        trainer: Of the run.
        module: A MemLongModule.
        data: Whose document.
        ckpt_path: Checkpoint whose weights are used, if any.
        file: File of the bank: opened if it is there, else written; None: it is kept nowhere.
        capacity: Size of a new bank [tokens]; None: everything.
        options: Of transformers' ``generate``, looked at before anything is read.

    Raises:
        UserError: If there is not one document, or something cannot be used.
    """
    found = documents(data)
    name, text = next(found)
    require(next(found, None) is None, "data.path", data.path, "one document", "name one file")
    reader = load_for_inference(trainer, module, ckpt_path)
    refuse_what_is_known(reader, data.window, [], options)

    def fallback() -> Path:
        return (begin_run(trainer) or Path()) / "bank.safetensors"

    banks = DocumentBanks(reader, file, capacity, data.window, fallback)
    return name, reader, banks.open_or_read(name, text)


def answer_prompts(
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
            text: str = conversation.say(as_prompt(model, prompt, chat), **options)
            yield Answer(document, prompt, text.strip(), conversation.passages, whole)


def as_prompt(model: MemLong, text: str, chat: bool | None) -> Prompt:
    """A prompt, or the message of a user where the backbone is to be chatted with."""
    template = bool(model.retrieval.tokenizer.chat_template)
    return [{"role": "user", "content": text}] if (template if chat is None else chat) else text


def predict(
    trainer: Any,
    module: Any,
    data: Any,
    ckpt_path: str | None,
    prompts: list[str],
    file: str | None,
    capacity: int | None,
    chat: bool | None,
    options: dict[str, Any],
) -> list[Answer]:
    """Answer prompts about each document of a DataModule; each answer is shown and written down as it comes.

    Args:
        trainer: Of the run.
        module: A MemLongModule.
        data: Whose documents.
        ckpt_path: Checkpoint whose weights are used, if any.
        prompts: What is asked.
        file: File of the bank, where there is one document.
        capacity: Size of a bank [tokens]; None: everything.
        chat: Whether prompts are messages in the backbone's chat template; None: if it has one.
        options: Of transformers' ``generate``.
    """
    several = documents(data)
    first, second = next(several), next(several, None)
    one = "null for several documents: a file holds the bank of one"
    require(file is None or second is None, "bank", file, one, "leave it out, or give --data.path one file")
    model = load_for_inference(trainer, module, ckpt_path)
    refuse_what_is_known(model, data.window, [as_prompt(model, prompt, chat) for prompt in prompts], options)

    @cache
    def folder() -> Path:  # made when there is something to put there, so that what is refused leaves nothing
        made = begin_run(trainer) or Path("answers")
        note_settings(trainer, module)
        return made

    keep = None if second else lambda: folder() / "bank.safetensors"
    banks = DocumentBanks(model, file, capacity, data.window, keep)
    given: list[Answer] = []
    try:
        for name, text in chain([first], [second] if second else [], several):
            bank = banks.open_or_read(name, text)
            if not given:
                note(f"Answers, as they come: {folder() / 'answers.md'}, answers.jsonl")
            for answer in answer_prompts(model, name, bank, prompts, chat, data.window, options):
                write_answer(folder(), answer)
                show_answer(answer)
                given.append(answer)
    except KeyboardInterrupt:
        note("\nInterrupted. The answers so far are kept.")
        raise SystemExit(130) from None
    if banks.problem is not None:
        raise banks.problem
    return given
