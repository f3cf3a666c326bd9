"""``datamodules`` and ``callbacks`` by two names each, which are the same modules.

In a checkout they are folders at the top, as YAML files name them (``datamodules.PG19``). In an installed package they
lie inside this one, ``lightning_memlong.datamodules``, so that nobody finds names in their site-packages that are as
likely to be a package of their own. One of the two names is the real one, which a module calls itself; the other is
found by an :class:`_Alias`. Either holds everywhere, with one exception: short names belong to whoever runs, so in an
installed package they are ours only in a process of the command line (:func:`claim_names`).
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from lightning_memlong.errors import UserError

PACKAGE = "lightning_memlong"
HOME = Path(__file__).parents[1]
FOLDERS = ("datamodules", "callbacks")


class _Alias(MetaPathFinder, Loader):
    """Finds a package and its modules by another name than their own.

    Args:
        name: The other name.
        real: Its own.
    """

    def __init__(self, name: str, real: str) -> None:
        self.name, self.real = name, real
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the other name or what is under it; None where there is no such module by the real name."""
        if fullname != self.name and not fullname.startswith(f"{self.name}."):
            return None
        found = importlib.util.find_spec(self._real(fullname))
        return None if found is None else ModuleSpec(fullname, self, origin=found.origin)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, imported by its own name."""
        module = importlib.import_module(self._real(spec.name))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run again; and the module keeps its own spec, in whose place importlib has put ours."""
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = self._specs.pop(spec.name)

    def _real(self, fullname: str) -> str:
        return self.real + fullname.removeprefix(self.name)


def _is_ours(folder: str) -> bool:
    """Whether a folder's short name is found on the path and means ours, as where the command is run in a checkout."""
    if (HOME / folder).is_dir():  # installed
        return False
    found = PathFinder.find_spec(folder)
    return found is not None and found.origin is not None and Path(found.origin).parent.samefile(HOME.parent / folder)


def add_second_names() -> None:
    """Let ``lightning_memlong.datamodules`` be found in a checkout as it is in an installed package."""
    sys.meta_path[:0] = [_Alias(f"{PACKAGE}.{folder}", folder) for folder in FOLDERS if _is_ours(folder)]


def claim_names() -> None:
    """Let the short names be ours in this process, whatever else is on the path by them.

    Raises:
        UserError: If one is loaded already, and is another's.
    """
    known = {finder.name for finder in sys.meta_path if isinstance(finder, _Alias)}
    for folder in FOLDERS:
        real = f"{PACKAGE}.{folder}"
        if {folder, real} & known:
            continue
        if (taken := sys.modules.get(folder)) is not None:
            raise UserError(
                f"{folder}: {taken.__file__ or taken.__path__} is loaded by this name, which the command line needs. "
                f"Allowed: a process without it. Fix: run memlong as a process, or import {PACKAGE}.cli first."
            )
        sys.meta_path.insert(0, _Alias(folder, real))
