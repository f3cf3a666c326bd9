"""Files of a folder on this machine: links are followed, no folder is entered twice, what is passed over is counted."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .splits import some


@dataclass
class PassedOver:
    """Files that are not read, for messages."""

    hidden: list[str] = field(default_factory=list)
    """Files and folders whose names begin with a dot."""
    broken: list[str] = field(default_factory=list)
    """Links to nothing, such as annexed files that were not fetched."""
    twice: list[str] = field(default_factory=list)
    """Other names of files that are read."""
    endings: Counter[str] = field(default_factory=Counter)
    """Endings of files that are no text, with how many have them."""

    def words(self) -> str:
        """What there is, in one line; empty if nothing was passed over."""
        other = ", ".join(f"{ending or 'none'} {count:,}" for ending, count in self.endings.most_common(8))
        parts = [f"{some(self.broken)} links to nothing (fetch what they stand for)" if self.broken else ""]
        parts += [f"{some(self.twice)} the same as others" if self.twice else ""]
        parts += [f"{some(self.hidden)} hidden" if self.hidden else ""]
        parts += [f"{sum(self.endings.values()):,} of other endings ({other})" if other else ""]
        return "; ".join(part for part in parts if part)


def walk(root: Path, passed: PassedOver) -> list[Path]:
    """The files below a folder; a folder that is there and linked as well has the name of its place."""
    found: list[Path] = []
    seen: set[str] = set()
    waiting = [str(root)]
    while waiting:
        top = waiting.pop(0)
        if os.path.realpath(top) in seen:
            passed.twice.append(f"{os.path.relpath(top, root)}/")
            continue
        for folder, folders, files in os.walk(top):
            seen.add(os.path.realpath(folder))
            passed.hidden += [
                f"{os.path.relpath(os.path.join(folder, f), root)}/" for f in folders if f.startswith(".")
            ]
            shown = sorted(os.path.join(folder, f) for f in folders if not f.startswith("."))
            waiting += [path for path in shown if os.path.islink(path)]
            folders[:] = [os.path.basename(p) for p in shown if os.path.realpath(p) not in seen]
            found += [path for name in sorted(files) if (path := _file(root, folder, name, passed)) is not None]
    return found


def _file(root: Path, folder: str, name: str, passed: PassedOver) -> Path | None:
    """A file of a folder, if it is one to read."""
    path = Path(folder, name)
    if name.startswith("."):
        passed.hidden.append(os.path.relpath(path, root))
    elif not path.exists():
        passed.broken.append(os.path.relpath(path, root))
    elif path.is_file():
        return path
    return None
