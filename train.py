"""Entry point: ``python train.py {fit,validate,test,predict,chat,export,layers} --config conf/memlong.yaml``."""

import difflib
import sys

SUBCOMMANDS = {
    "fit": "Train the layers above the memory layer, and validate with memory on and off.",
    "validate": "Perplexity of the validation text, with memory on and off.",
    "test": "The same of the test text; or an evaluation of conf/eval/: perplexity, recall, choosing.",
    "predict": "Read each document of --data.path into memory, whole, and answer prompts about it.",
    "chat": "Read a document into memory and talk about it.",
    "export": "Write a plain Hugging Face folder, with the memory's settings beside the weights.",
    "layers": "Score the backbone, untrained, with memory in other layers.",
}


def first_help() -> str:
    """What there is, without loading any of it."""
    lines = [f"  {name:10}{what}" for name, what in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: python train.py SUBCOMMAND --config conf/memlong.yaml [--config MORE.yaml] [--OPTION VALUE ...]",
            "",
            "subcommands (SUBCOMMAND --help names every option, with unit and default):",
            *lines,
            "",
            "  --debug   Show the traceback of errors.",
        ]
    )


def answered_at_once(arguments: list[str]) -> int | None:
    """Exit status of what needs nothing loaded: the first help, and a subcommand that there is not; else None."""
    if not arguments or arguments in (["-h"], ["--help"]):
        print(first_help())
        return 0 if arguments else 2
    if arguments[0].startswith("-") or arguments[0] in SUBCOMMANDS:
        return None
    near = difflib.get_close_matches(arguments[0], SUBCOMMANDS, n=1)
    fix = f"did you mean {near[0]}?" if near else "python train.py --help says what each does."
    print(f"error: no subcommand {arguments[0]!r}. Allowed: {', '.join(SUBCOMMANDS)}. Fix: {fix}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    status = answered_at_once(sys.argv[1:])
    if status is None:
        from lightning_memlong.cli import main

        status = main()
    sys.exit(status)
