"""``memlong chat book.txt``: read a document, then talk about it at the terminal.

Answers are shown as they are written, with the passages they were written with. ``--bank book.safetensors`` keeps what
was read for the next time, ``--model.backbone`` and ``--memory.top_k`` are what they are everywhere; without a
``--config`` the options of ``conf/memlong.yaml`` hold.
"""

import io
import sys
from typing import Any

from transformers import TextStreamer

from lightning_memlong import cli
from lightning_memlong.bank import MemoryBank
from lightning_memlong.cli.answers import show_passages
from lightning_memlong.cli.console import wide_console
from lightning_memlong.cli.messages import exit_status
from lightning_memlong.cli.parser import config_files
from lightning_memlong.cli.predict import as_prompt
from lightning_memlong.config import require
from lightning_memlong.errors import UserError
from lightning_memlong.generation import Conversation
from lightning_memlong.memlong import MemLong
from lightning_memlong.shipped import CONF

HELP = """Ask about the document. Beside that:
  /new        begin a new conversation; the document stays read
  /passages   the passages of the last answer, whole
  /help       this
  /quit       end; so does Ctrl-D. Ctrl-C ends an answer"""


def talk(model: MemLong, memory: MemoryBank, window: int, options: dict[str, Any]) -> None:
    """Answer what a person types until they have enough.

    Args:
        model: Writes.
        memory: What was read.
        window: Tokens of the local context [tokens].
        options: Of transformers' ``generate``.
    """
    out = wide_console(beside=True)
    whole = int(memory.ends()[0])
    out.print(f"{whole:,} tokens in memory. /help tells what can be typed.", highlight=False)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text do not end it
    conversation = Conversation(model.long_context, memory, window=window)
    streamer = TextStreamer(model.retrieval.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        while True:
            typed = _next_line()
            if typed in ("/quit", "/exit"):
                return
            if typed == "/new":
                conversation.close()
                conversation = Conversation(model.long_context, memory, window=window)
            elif typed == "/passages":
                for passage in conversation.passages:
                    show_passages([passage], whole)
                    out.print(passage.text, markup=False, highlight=False)
            elif typed.startswith("/"):
                out.print(HELP, markup=False, highlight=False)
            elif typed and _write_answer(model, conversation, typed, streamer, options):
                show_passages(conversation.passages, whole)
    except (EOFError, KeyboardInterrupt):
        out.print()
    finally:
        conversation.close()


def _next_line() -> str:
    """What a person types next; of what is piped in, the next line, without a prompt in the answers."""
    if sys.stdin.isatty():
        return input("\n> ").strip()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def _write_answer(
    model: MemLong, conversation: Conversation, typed: str, streamer: TextStreamer, options: dict[str, Any]
) -> bool:
    """Write an answer; whether there is one, whole or broken off."""
    prompt = as_prompt(model, typed, None)
    if isinstance(prompt, str) and conversation.context.ids.shape[1]:
        prompt = f"\n{prompt}"  # no template parts the turns
    try:
        conversation.say(prompt, streamer=streamer, **options)
    except KeyboardInterrupt:
        wide_console(beside=True).print("(broken off)", style="dim")
    except UserError as error:
        streamer.end()  # it waits for the rest of an answer
        wide_console(beside=True).print(f"{error}", markup=False, highlight=False)
        return False
    return True


def main(arguments: list[str]) -> int:
    """Read the document that is named first, or by ``--data.path``, and talk about it.

    Returns:
        As :func:`lightning_memlong.cli.main`.
    """
    if arguments and not arguments[0].startswith("-"):
        if any(a.partition("=")[0] == "--data.path" for a in arguments):
            return exit_status(lambda: require(False, "chat", arguments[0], "one text", "leave --data.path out"))
        arguments = [*arguments[1:], "--data.path", arguments[0]]  # last: a --config would win over what stands before
    return cli.main(["chat", *with_defaults(arguments)])


def with_defaults(arguments: list[str]) -> list[str]:
    """Options that begin with those of ``conf/memlong.yaml``, unless they name a file of their own."""
    return arguments if config_files(arguments) else ["--config", str(CONF / "memlong.yaml"), *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
