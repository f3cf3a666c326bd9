"""The YAML files of ``conf/``: found by their names from any folder, in a checkout and in an installed package."""

import difflib
from pathlib import Path

from lightning_memlong.errors import UserError

_HOME = Path(__file__).parents[1]
INSTALLED = (_HOME / "conf").is_dir()
"""Whether this is an installed package, not a checkout (installed editable or not at all)."""
CONF = (_HOME if INSTALLED else _HOME.parent) / "conf"
"""Where they lie: inside the package, or at the top of a checkout."""


def packaged_names() -> list[str]:
    """Their names, relative to ``conf/``."""
    return sorted(file.relative_to(CONF).as_posix() for file in CONF.rglob("*.yaml"))


def _packaged(name: str) -> Path | None:
    """The packaged file of a name, with ``conf/`` before it or without."""
    short = name.removeprefix("./").removeprefix("conf/")
    return CONF / short if short in packaged_names() else None


def find_yaml(name: str, option: str = "config") -> str:
    """The file of a name: one that is there from where one stands, or else the packaged one.

    Args:
        name: A path; or a name such as memlong.yaml, conf/memlong.yaml or eval/perplexity.yaml.
        option: For messages.

    Returns:
        The name itself for a file that is there; else the packaged file's path.

    Raises:
        UserError: If there is neither.
    """
    if Path(name).is_file():
        return name
    if (file := _packaged(name)) is not None:
        return str(file)
    known = packaged_names()
    near = difflib.get_close_matches(name.removeprefix("conf/"), known, n=1) or [
        other for other in known if Path(other).name == Path(name).name
    ]
    raise UserError(
        f"{option}={name!r}: no such file here, and none that is packaged. Allowed: the path of a YAML file, or one of "
        f"{', '.join(known)}. Fix: " + (f"did you mean {near[0]}?" if near else "correct it.")
    )


def hides_packaged(name: str) -> Path | None:
    """The packaged file that would be meant by a name if another file were not there; None: there is no such."""
    file = _packaged(name)
    here = Path(name)
    return file if file is not None and here.is_file() and not here.samefile(file) else None
