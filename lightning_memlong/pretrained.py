"""Models ready to read and write, from a checkpoint, an exported folder or any backbone."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_memlong.backbones import first_token, load_tokenizer
from lightning_memlong.config import MemoryConfig, RetrieverConfig, TuningConfig, changed, require
from lightning_memlong.exported import exported_memory, exported_settings

if TYPE_CHECKING:
    from lightning_memlong.model import MemLong

log = logging.getLogger(__name__)

MEMORY_LAYER = 0.375
"""Where a backbone without stored settings keeps its memory: layer 11 of the default one's 30."""


def from_pretrained(
    cls: "type[MemLong]", where: str, memory: MemoryConfig | Mapping[str, Any] | None, settings: dict[str, Any]
) -> "MemLong":
    """See :meth:`MemLong.from_pretrained`.

    Raises:
        UserError: If it cannot be loaded, its gates were trained for other layers, or settings cannot be used.
    """
    if (checkpoint := _checkpoint_of(Path(where))) is not None:
        model, stored = _from_checkpoint(cls, checkpoint, settings)
    else:
        model, stored = _from_folder(cls, where, settings)
    chosen = memory if isinstance(memory, MemoryConfig) else changed(memory_settings(stored), memory or {}, "memory")
    model.use_memory(chosen, load_tokenizer(model.name))
    return model.eval()


def _checkpoint_of(path: Path) -> Path | None:
    if path.suffix == ".ckpt":
        return path
    return path / "checkpoints" / "last.ckpt" if (path / "checkpoints").is_dir() else None


def _from_checkpoint(cls: "type[MemLong]", file: Path, settings: dict[str, Any]) -> "tuple[MemLong, Mapping[str, Any]]":
    from lightning_memlong.module import MemLongModule  # they bring Lightning, which nothing else here needs
    from lightning_memlong.stored import load_weights, read_checkpoint, stored_settings

    stored = stored_settings(read_checkpoint(file, str(file)))
    options = {**stored, **settings}
    options["tuning"] = TuningConfig(**options.get("tuning", {}))
    module = MemLongModule(**options)
    load_weights(module, str(file), complete=True)
    config = file.parents[1] / "config.yaml"
    run = yaml.safe_load(config.read_text()) if config.is_file() else {}
    return module.model, run.get("memory") or {}


def _from_folder(cls: "type[MemLong]", where: str, settings: dict[str, Any]) -> "tuple[MemLong, Mapping[str, Any]]":
    stored = exported_settings(where)
    chosen = dict(stored or {})
    bos = chosen.pop("prepend_bos", None)
    if "bos" not in settings and bos is not False:  # export writes the token, so that no tokenizer is needed
        chosen["bos"] = bos if isinstance(bos, int) and bos is not True else first_token(load_tokenizer(where), bos)
    if stored is None and "memory_layer" not in settings:
        chosen["memory_layer"] = MEMORY_LAYER
        log.info("%s comes without settings: memory_layer=%s of its depth", where, MEMORY_LAYER)
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
