"""``train.py layers``: the backbone, untrained, scored with memory in other layers; shown and written as it comes."""

from pathlib import Path
from typing import Any

from lightning_memlong.cli.console import show_layers, write_csv
from lightning_memlong.cli.run_folders import check_writable, run_folder
from lightning_memlong.cli.run_record import note_settings
from lightning_memlong.config import LayerIndex, require
from lightning_memlong.distributed import say
from lightning_memlong.evaluation import LayerChoice, layer_grid, layer_table, sweep_layers
from lightning_memlong.memlong import MemLong
from lightning_memlong.training import MemLongModule
from lightning_memlong.training.loggers import show_figure


class ValidationScore:
    """Perplexity of the validation text, of one wrapped backbone after the other.

    Args:
        trainer: Validates.
        module: Is given the wrapped backbones.
        data: Whose validation text.
    """

    def __init__(self, trainer: Any, module: MemLongModule, data: Any) -> None:
        self._trainer, self._module, self._data = trainer, module, data
        self.off = 0.0
        """Perplexity with memory off: the same whatever the layers, so measured once."""

    def __call__(self, wrapped: MemLong) -> float:
        """Perplexity with memory."""
        self._module.model, self._module.compare_memory_off = wrapped, not self.off
        self._trainer.validate(self._module, datamodule=self._data, verbose=False)
        self.off = self.off or float(self._trainer.callback_metrics["val/perplexity_memory_off"])
        return float(self._trainer.callback_metrics["val/perplexity"])


def score_layers(
    trainer: Any,
    module: MemLongModule,
    data: Any,
    memory_layers: list[LayerIndex],
    readers: list[str],
    sources: list[str],
) -> None:
    """Score every combination of layers.

    Args:
        trainer: Of the run.
        module: Whose backbone.
        data: Whose validation text.
        memory_layers: Layers that store.
        readers: Which layers read.
        sources: ``per_layer`` and ``single``.

    Raises:
        UserError: If they cannot be scored.
    """
    check_layers(trainer, module)
    backbone = module.model.unwrap()
    cells = layer_grid(memory_layers, readers, sources, backbone)
    require(bool(cells), "memory_layers", memory_layers, "at least one with layers that read", "name others")
    windows = trainer.limit_val_batches
    require(windows != 0, "trainer.limit_val_batches", windows, "1 or more windows", "raise it")
    folder = run_folder(trainer) or Path("layers")
    check_writable(folder)
    say(f"{_distinct(cells)} combinations of layers; results as they come: {folder / 'layers.csv'}", flush=True)
    note_settings(trainer, module)
    loggers, trainer.loggers = trainer.loggers, []  # the curves of a run are no place for them
    try:
        rows = _score_cells(backbone, cells, ValidationScore(trainer, module, data), module, folder)
    finally:
        trainer.loggers = loggers
    title = f"{Path(module.backbone_name).name}, {data.text_name}, untrained"
    figure = show_layers(rows, title, folder)
    if figure is not None:  # drawn by the first process
        show_figure(loggers, "layers/ratio", figure)


def check_layers(trainer: Any, module: MemLongModule) -> None:
    """Refuse settings under which layers cannot be compared.

    Raises:
        UserError: For them.
    """
    fusion = module.model.layout.fusion
    require(fusion == "joint", "model.fusion", fusion, "joint: untrained gates are closed", "leave it out")
    require(trainer.memory_callback() is not None, "memory.enabled", False, "true", "leave it out")


def _distinct(cells: list[LayerChoice]) -> int:
    return len({cell.layers for cell in cells})


def _score_cells(
    backbone: Any, cells: list[LayerChoice], score: ValidationScore, module: MemLongModule, folder: Path
) -> list[dict[str, Any]]:
    """Score cells, write each result down at once, and give all as rows."""
    settings, bos = module.settings, module.model.bos
    scores: dict[LayerChoice, float] = {}
    seen: set[object] = set()
    for cell, value in sweep_layers(backbone, cells, score, settings, bos):
        scores[cell] = value
        write_csv(folder / "layers.csv", layer_table(scores, score.off))
        if cell.layers not in seen:
            seen.add(cell.layers)
            where = f"{cell.source}, memory layer {cell.memory_layer}, read in {cell.readers}"
            what = f"{value:.3f}, memory off {score.off:.3f}, ratio {value / score.off:.4f}"
            say(f"{len(seen)}/{_distinct(cells)}  {where}: {what}", flush=True)
    return layer_table(scores, score.off)
