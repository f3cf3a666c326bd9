"""Checks that all settings share, with one format of what they say; and changing settings by name."""

import importlib.util
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lightning_memlong.errors import UserError


def require(ok: bool, key: str, value: object, allowed: str, fix: str) -> None:
    """Raise a :class:`UserError` in the project's one format unless ``ok``."""
    if not ok:
        raise UserError(f"{key}={value!r} cannot be used. Allowed: {allowed}. Fix: {fix}.")


def require_whole(key: str, value: object) -> None:
    """Raise unless a value is a whole number."""
    require(_is(value, int), key, value, SCALARS[int], "correct it")


SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _is(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and math.isfinite(value)
    wider: dict[type, Any] = {int: Integral, str: (str, PathLike)}  # NumPy's numbers, paths
    return isinstance(value, wider.get(kind, kind))


def require_types(config: Any, key: str) -> None:
    """Raise unless each number, text and switch of a settings dataclass is one: a file's ``null`` is none.

    Args:
        config: The dataclass. Fields of other types than these are left to whom they belong.
        key: Its group, for messages.

    Raises:
        UserError: If a value is of another type, or no finite number.
    """
    for name, hint in get_type_hints(type(config)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if not all(kind in SCALARS for kind in kinds):
            continue
        value = getattr(config, name)
        ok = any(_is(value, kind) for kind in kinds)
        allowed = " or ".join(SCALARS[kind] for kind in kinds)
        require(ok, f"{key}.{name}", value, allowed, "correct it, or leave it out for the default")


def require_choice(key: str, value: object, choices: Any) -> None:
    """Raise unless ``value`` is one of the choices of a ``Literal`` type or a collection."""
    names = get_args(choices) or tuple(choices)
    require(value in names, key, value, "one of " + ", ".join(map(str, names)), f"set --{key} to one of them")


def is_import_path(name: str) -> bool:
    """Whether a name is a dotted path into a module that is there, and no file."""
    dotted = all(part.isidentifier() for part in name.split(".")) and "." in name
    return dotted and not Path(name).exists() and importlib.util.find_spec(name.partition(".")[0]) is not None


def named_or_imported(key: str, name: str, known: Mapping[str, Any], what: str = "a function") -> Any:
    """What a setting names: one of ours, or an import path.

    Raises:
        UserError: If there is no such thing, or it cannot be called.
    """
    if name in known:
        return known[name]
    try:
        found = pkgutil.resolve_name(name)
        if "." not in name or not callable(found):
            raise ImportError(f"{name} is not {what}")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        names = "".join(f"{n}, " for n in known)
        raise UserError(
            f"{key}={name!r} is unknown. Allowed: {names}or the import path of {what}. "
            "Fix: correct the name, or the path (module.function)."
        ) from error
    return found


def changed(config: Any, options: Mapping[str, Any], key: str) -> Any:
    """A copy of a settings dataclass with some fields changed, checked anew."""
    known = type(config).__dataclass_fields__
    allowed = "options of it by name: " + ", ".join(known)
    require(isinstance(options, Mapping), key, options, allowed, "give {name: ...}, for instance")
    for name in options:
        require(name in known, f"{key}.{name}", options[name], "one of " + ", ".join(known), "correct the name")
    values = {name: _changed_to(getattr(config, name), value, f"{key}.{name}") for name, value in options.items()}
    return replace(config, **values)


def _changed_to(before: Any, value: Any, key: str) -> Any:
    if not hasattr(before, "__dataclass_fields__") or isinstance(value, type(before)):
        return value
    return changed(before, value, key)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()}
