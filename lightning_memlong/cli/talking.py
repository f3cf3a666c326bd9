"""A conversation at the terminal: answers as they are written, and the passages they were written with."""

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer

from lightning_memlong.bank import MemoryBank
from lightning_memlong.cli.console import console
from lightning_memlong.cli.predict import as_prompt, show_passages
from lightning_memlong.errors import UserError
from lightning_memlong.generation import Conversation
from lightning_memlong.memlong import MemLong

HELP = """Ask about the document. Beside that:
  /new        begin a new conversation; the document stays read
  /passages   the passages of the last answer, whole
  /help       this
  /quit       end; so does Ctrl-D. Ctrl-C ends an answer"""


def talk(
    model: MemLong, memory: MemoryBank, window: int, options: dict[str, Any], ask: Callable[[str], str] = input
) -> None:
    """Answer what a person types until they have enough.

    Args:
        model: Writes.
        memory: What was read.
        window: Tokens of the local context [tokens].
        options: Of transformers' ``generate``.
        ask: Gives what the person types, after showing its argument; raises EOFError at the end.
    """
    out = console()
    whole = int(memory.ends()[0])
    out.print(f"{whole:,} tokens in memory. /help tells what can be typed.", highlight=False)
    conversation = Conversation(model.long_context, memory, window=window)
    streamer = TextStreamer(model.retrieval.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        while True:
            typed = ask("\n> ").strip()
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
            elif typed and _answer(model, conversation, typed, streamer, options):
                show_passages(conversation.passages, whole)
    except (EOFError, KeyboardInterrupt):
        out.print()
    finally:
        conversation.close()


def _answer(
    model: MemLong, conversation: Conversation, typed: str, streamer: TextStreamer, options: dict[str, Any]
) -> bool:
    """Write an answer; whether there is one, whole or broken off."""
    prompt = as_prompt(model, typed, None)
    if isinstance(prompt, str) and conversation.context.ids.shape[1]:
        prompt = f"\n{prompt}"  # no template parts the turns
    try:
        conversation.say(prompt, streamer=streamer, **options)
    except KeyboardInterrupt:
        console().print("(broken off)", style="dim")
    except UserError as error:
        streamer.end()  # it waits for the rest of an answer
        console().print(f"{error}", markup=False, highlight=False)
        return False
    return True
