"""What a model with a memory is worth: perplexity, in-context learning, recall, layers. Gives tables, prints nothing.

``Evaluation`` is what a new one is derived from, ``Subject`` what it is given; ``Record`` keeps what was measured, and
``Report`` is what was found.
"""

from lightning_memlong.evaluation.base import Evaluation, Progress, Report, Subject, TableRow
from lightning_memlong.evaluation.eviction import EvictionGrid
from lightning_memlong.evaluation.figures import draw_layers
from lightning_memlong.evaluation.icl import InContextLearning
from lightning_memlong.evaluation.layer_grid import READERS, LayerChoice, layer_grid, layer_table, sweep_layers
from lightning_memlong.evaluation.perplexity import PerplexityGrid
from lightning_memlong.evaluation.recall import RecallProbes
from lightning_memlong.evaluation.record import Measurement, Record

__all__ = [
    "READERS",
    "Evaluation",
    "EvictionGrid",
    "InContextLearning",
    "LayerChoice",
    "Measurement",
    "PerplexityGrid",
    "Progress",
    "RecallProbes",
    "Record",
    "Report",
    "Subject",
    "TableRow",
    "draw_layers",
    "layer_grid",
    "layer_table",
    "sweep_layers",
]
