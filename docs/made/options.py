"""Every option with its default, unit and allowed values, taken from the code.

Texts are the docstrings that ``--help`` shows. What is allowed is asked of the checks themselves: each option is given
values that cannot be right, and the error names what would be.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import torch

from lightning_memlong.backbone import layer_index
from lightning_memlong.bank import load_policy
from lightning_memlong.errors import UserError
from lightning_memlong.retrieval import load_selector

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
UNIT = re.compile(r" ?\[([^\[\]]+)\]")
WRONG: dict[type, list[Any]] = {int: [-1, 0], float: [-1.0, 0.0, 2.0], str: ["/"], list: [[], [-1], ["/"]]}
"""Values to be refused, by the kind of an option: the text is no name, and a folder without a model in it."""
LATER: dict[str, Callable[[], Any]] = {
    "model.memory_layer": lambda: layer_index("model.memory_layer", -1, 30),
    "memory.policy": lambda: load_policy("?"),
    "memory.selection": lambda: load_selector("?"),
}
"""Options that are checked once more is known than the settings; the default backbone has 30 layers."""
LOADS = frozenset({"model.prepend_bos"})
"""Options whose check loads a backbone; their type must do."""


@dataclass(frozen=True)
class Option:
    """One option as a page shows it."""

    key: str
    """Dotted, as it is typed."""
    default: str
    text: str
    unit: str | None
    allowed: str


def options_of(make: Callable[..., Any], group: str, leave_out: frozenset[str] = frozenset()) -> Iterator[Option]:
    """The options of a class or function, nested settings among them.

    Args:
        make: What takes them: a settings dataclass, a class, or a method of the Trainer.
        group: Their group, such as ``memory``; empty for options that stand alone.
        leave_out: Names that are not options.
    """
    texts = _texts(make)
    for name, (hint, default) in _signature(make).items():
        key = f"{group}.{name}" if group else name
        if name in leave_out:
            continue
        if is_dataclass(hint):
            yield from options_of(hint, key)  # type: ignore[arg-type]
            continue
        text = " ".join(texts[name].split())
        found = UNIT.search(text)
        unit = found[1] if found else None
        text = UNIT.sub("", text, count=1) if found else text
        yield Option(key, shown(default), text, unit, _allowed(make, name, key, hint))


def shown(value: Any) -> str:
    """A value as YAML says it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if inspect.isfunction(value):  # an optimiser and its arguments
        made = value([torch.nn.Parameter(torch.zeros(1))])
        return f"{type(made).__name__}(lr={made.defaults['lr']}, weight_decay={made.defaults['weight_decay']})"
    if inspect.isclass(value):
        return value.__name__
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    return '""' if value == "" else str(value)


def _texts(make: Callable[..., Any]) -> dict[str, str]:
    """What docstrings say of each option: under the fields of a dataclass, else among the ``Args``."""
    parsed = docstring_parser.parse_from_object(make) if inspect.isclass(make) else docstring_parser.parse(make.__doc__)
    return {p.arg_name: p.description or "" for p in parsed.params}


def _signature(make: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Type and default of each option."""
    if is_dataclass(make):
        hints = get_type_hints(make)
        return {f.name: (hints[f.name], _default(f)) for f in fields(make) if f.init}
    function = make.__init__ if inspect.isclass(make) else make
    hints = get_type_hints(function)
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in plain and p.name != "self"]
    return {p.name: (hints.get(p.name, Any), None if p.default is p.empty else p.default) for p in parameters}


def _default(field: Any) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()


def _allowed(make: Callable[..., Any], name: str, key: str, hint: Any) -> str:
    """What may be given, in the words of the check where there is one, else of the type."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    several = any(get_origin(kind) is list for kind in kinds)
    said = next((s for build in _wrong(make, name, key, kinds) if (s := _refusal(build, key))), None)
    if said is None:
        said = " or ".join(dict.fromkeys(_words(kind) for kind in kinds if kind is not type(None)))
    elif several and said.startswith("one of "):
        said = "any of " + said.removeprefix("one of ")
    said = re.sub(r"(?<=[a-z]\.)(\w+)=[^\s,]+", r"\1", said)  # of another option its name, not what it happens to be
    return f"null, or {said}" if type(None) in kinds and "null" not in said else said


def _wrong(make: Callable[..., Any], name: str, key: str, kinds: tuple[Any, ...]) -> Iterator[Callable[[], Any]]:
    """Ways of giving an option what it cannot be."""
    if key in LATER:
        yield LATER[key]
    if inspect.isclass(make) and key not in LOADS:
        for kind in kinds:
            for value in WRONG.get(get_origin(kind) or kind, []):
                yield lambda value=value: make(**{name: value})


def _refusal(build: Callable[[], Any], key: str) -> str | None:
    """What the check of an option says is allowed, where it refuses a value."""
    try:
        build()
    except UserError as error:
        told = re.match(rf"{re.escape(key)}=.*? Allowed: (.*?)\. Fix: ", str(error), re.S)
        return told[1] if told else None
    except Exception:  # a value that only what comes later would refuse
        return None
    return None


def _words(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list"
    if get_origin(kind) is dict:
        return "names with values: {name: ...}"
    return WORDS.get(kind, "a class and its arguments")
