"""Models ready to read and write, from a checkpoint, an exported folder or any backbone."""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_memlong.backbone.loading import first_token, load_tokenizer
from lightning_memlong.config import DEFAULT_MEMORY_LAYER, MemoryConfig, RetrieverConfig, TuningConfig, changed, require
from lightning_memlong.errors import UserError
from lightning_memlong.model.export import exported_memory, exported_settings

if TYPE_CHECKING:
    from lightning_memlong.model.model import MemLong

log = logging.getLogger(__name__)


def from_pretrained(
    cls: "type[MemLong]", where: str, memory: MemoryConfig | Mapping[str, Any] | None, settings: dict[str, Any]
) -> "MemLong":
    """See :meth:`MemLong.from_pretrained`.

    Raises:
        UserError: If it cannot be loaded, its gates were trained for other layers, or settings cannot be used.
    """
    known = set(inspect.signature(cls.__init__).parameters) - {"self", "backbone"}
    for name, value in settings.items():
        require(name in known, name, value, "settings of MemLong: " + ", ".join(sorted(known)), "correct the name")
    if (checkpoint := _checkpoint_of(Path(where))) is not None:
        model, stored = _from_checkpoint(checkpoint, settings, memory is not None)
    else:
        model, stored = _from_folder(cls, where, settings)
    chosen = memory if isinstance(memory, MemoryConfig) else changed(memory_settings(stored), memory or {}, "memory")
    model.use_memory(chosen, load_tokenizer(model.name))
    return model.eval()


def _checkpoint_of(path: Path) -> Path | None:
    """The checkpoint a path means: itself, or the newest of a run folder."""
    if path.suffix == ".ckpt":
        return path
    folder = path / "checkpoints"
    newest = max(folder.glob("last*.ckpt"), key=lambda f: f.stat().st_mtime, default=folder / "last.ckpt")
    return newest if folder.is_dir() else None


def _from_checkpoint(file: Path, settings: dict[str, Any], memory: bool) -> "tuple[MemLong, Mapping[str, Any]]":
    from lightning_memlong.model.checkpoint import load_weights, read_checkpoint, stored_settings
    from lightning_memlong.training.module import MemLongModule  # they bring Lightning, which nothing else here needs

    stored = stored_settings(read_checkpoint(file, str(file)))
    stored["tuning"] = TuningConfig(**stored.get("tuning", {}))
    if "bos" in settings:
        settings = {**settings, "prepend_bos": False if settings["bos"] is None else settings["bos"]}
        del settings["bos"]
    module = MemLongModule(**{**stored, **settings})
    load_weights(module, str(file), complete=True)
    return module.model, _memory_of_run(file, memory)


def _memory_of_run(file: Path, given: bool) -> Mapping[str, Any]:
    """The memory settings of the run a checkpoint lies in; where it lies in none, those that were given must do.

    Raises:
        UserError: If they are not there, and none were given.
    """
    config = file.absolute().parents[1] / "config.yaml"
    try:
        return dict(yaml.safe_load(config.read_text())["memory"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        if given:
            return {}
        raise UserError(
            f"memory: the settings of the run are not in {config} ({type(error).__name__}). Allowed: a checkpoint in "
            "its run folder, or any with settings of the memory. Fix: give memory={'chunk_size': ...}."
        ) from error


def _from_folder(cls: "type[MemLong]", where: str, settings: dict[str, Any]) -> "tuple[MemLong, Mapping[str, Any]]":
    stored = exported_settings(where)
    chosen = dict(stored or {})
    bos = chosen.pop("prepend_bos", None)
    if "bos" not in settings and bos is not False:  # export writes the token, so that no tokenizer is needed
        chosen["bos"] = bos if isinstance(bos, int) and bos is not True else first_token(load_tokenizer(where), bos)
    if stored is None and "memory_layer" not in settings:
        chosen["memory_layer"] = DEFAULT_MEMORY_LAYER
        log.info("%s comes without settings: memory_layer=%s of its depth", where, DEFAULT_MEMORY_LAYER)
    return cls(where, **(chosen | settings)), exported_memory(where)


def memory_settings(stored: Mapping[str, Any]) -> MemoryConfig:
    """Memory settings that were stored with weights; defaults for those that were not."""
    known = MemoryConfig.__dataclass_fields__
    for name, value in stored.items():
        require(name in known, f"memory.{name}", value, "one of " + ", ".join(known), "remove it from the stored file")
    given = dict(stored)
    if isinstance(given.get("retriever"), Mapping):
        given["retriever"] = RetrieverConfig(**given["retriever"])
    return MemoryConfig(**given)
