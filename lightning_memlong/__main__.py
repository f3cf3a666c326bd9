"""The command ``memlong``, which is ``python -m lightning_memlong`` and ``train.py`` as well."""

import sys
from importlib import import_module

from lightning_memlong.errors import UserError

SUBCOMMANDS = {
    "fit": "Train the layers above the memory layer, and validate with memory on and off.",
    "validate": "Perplexity of the validation text, with memory on and off.",
    "test": "The same of the test text; or an evaluation of conf/eval/: perplexity, recall, choosing.",
    "predict": "Read each document of --data.path into memory, whole, and answer prompts about it.",
    "export": "Write a plain Hugging Face folder, with the memory's settings beside the weights.",
    "layers": "Score the backbone, untrained, with memory in other layers.",
}
"""Of the command line, with its groups of options."""
PROGRAMS = {
    "chat": ("lightning_memlong.cli.chat", "Read a document, named first, into memory and talk about it."),
    "look": ("lightning_memlong.look.__main__", "Show a book beside its memory, on a page of this machine."),
    "sweep": ("lightning_memlong.sweep.__main__", "Make the runs of a sweep file, and report them."),
    "lm-eval": ("lightning_memlong.lm_eval.__main__", "EleutherAI's lm-eval with --model memlong."),
}
"""Others: the module whose ``main(arguments)`` gives the exit status, and what it does."""


def first_help(program: str) -> str:
    """What there is, without loading any of it."""
    lines = [f"  {name:10}{what}" for name, what in SUBCOMMANDS.items()]
    others = [f"  {name:10}{what}" for name, (_, what) in PROGRAMS.items()]
    return "\n".join(
        [
            f"usage: {program} SUBCOMMAND --config memlong.yaml [--config MORE.yaml] [--OPTION VALUE ...]",
            "",
            "subcommands (SUBCOMMAND --help names every option, with unit and default):",
            *lines,
            "",
            "with options of their own:",
            *others,
            "",
            "  --debug   Show the traceback of errors.",
            "  --version",
        ]
    )


def answered_at_once(arguments: list[str], program: str = "memlong") -> int | None:
    """Exit status of what needs nothing loaded: the first help, and a subcommand that there is not; else None."""
    if not arguments or arguments in (["-h"], ["--help"]):
        print(first_help(program))
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(import_module("lightning_memlong").__version__)
        return 0
    known = [*SUBCOMMANDS, *PROGRAMS]
    if arguments[0].startswith("-") or arguments[0] in known:
        return None
    import difflib

    near = difflib.get_close_matches(arguments[0], known, n=1)
    fix = f"did you mean {near[0]}?" if near else f"{program} --help says what each does."
    print(f"error: no subcommand {arguments[0]!r}. Allowed: {', '.join(known)}. Fix: {fix}", file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None, program: str = "memlong") -> int:
    """Run the command.

    Args:
        arguments: Those of the process by default.
        program: How it is called, for messages.

    Returns:
        The exit status; 2 after a mistake that a person can fix.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if (status := answered_at_once(given, program)) is not None:
        return status
    its_own = given[0] in PROGRAMS
    try:
        loaded = import_module(PROGRAMS[given[0]][0] if its_own else "lightning_memlong.cli")
    except UserError as error:  # an extra that is not installed
        print(f"error: {error}", file=sys.stderr)
        return 2
    return loaded.main(given[1:] if its_own else given)


if __name__ == "__main__":
    sys.exit(main(program="python -m lightning_memlong"))
