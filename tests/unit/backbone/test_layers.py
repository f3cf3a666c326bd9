"""Layers by index or by fraction, and the grid of a sweep over them."""

import pytest

from lightning_memlong.backbone.layers import choose_layers, layer_index, unlimited_layers
from lightning_memlong.config import ModelConfig
from lightning_memlong.errors import UserError
from lightning_memlong.evaluation.layer_grid import LayerChoice, layer_grid, layer_table, retrieval_layers, sweep_layers
from lightning_memlong.memlong import MemLong
from tests.conftest import tiny_llama


@pytest.mark.parametrize(
    ("value", "count", "layer"),
    [(13, 26, 13), (0.5, 26, 13), (0.0, 26, 0), (0.99, 26, 25), (0.5, 5, 2), (13.0, 26, 13)],
)
def test_indices_and_fractions(value: float, count: int, layer: int) -> None:
    assert layer_index("model.memory_layer", value, count) == layer


@pytest.mark.parametrize("value", [-1, 26, -0.1, 1.5, 26.0, float("nan")])
def test_what_is_no_layer_is_told(value: float) -> None:
    with pytest.raises(UserError, match=r"model.memory_layer=.*0..25, or a fraction.*26 layers"):
        layer_index("model.memory_layer", value, 26)


def test_layers_are_chosen() -> None:
    assert choose_layers(0.5, [0.5, 17, 0.9, 25], 26, range(26)) == (13, [13, 17, 23, 25])
    assert choose_layers(2, None, 5, [1, 3, 4]) == (2, [3, 4])
    with pytest.raises(UserError, match="model.retrieval_layers=None.*at least one layer that sees the whole context"):
        choose_layers(4, None, 5, [1, 3])
    with pytest.raises(UserError, match="model.memory_layer=3 up"):
        choose_layers(3, [0.1, 4], 5, range(5))
    kinds = ["sliding_attention", "full_attention"]
    assert unlimited_layers(kinds, 2) == [1] and unlimited_layers(None, 2) == [0, 1]
    assert unlimited_layers(["sliding_attention"] * 2, 2) == [0, 1]


def test_who_reads() -> None:
    assert retrieval_layers("spread", 13, 26, range(26)) == (13, 16, 19, 22)
    assert retrieval_layers("spread", 24, 26, range(26)) == (24, 25)
    assert retrieval_layers("above", 1, 4, [0, 3]) == (3,)
    assert retrieval_layers("every", 1, 4, [0, 3]) == (1, 2, 3)
    assert retrieval_layers("own", 1, 4, [0, 3]) == (1,)


def test_each_set_of_layers_is_scored_once_and_the_backbone_given_back() -> None:
    backbone = tiny_llama()
    cells = layer_grid([0.5, 3], ["above", "every", "spread", "own"], ["single", "per_layer"], backbone)
    assert {c.readers for c in cells} == {"above", "spread", "own"}, "every is above where no layer has a window"
    assert len(cells) == 12
    seen: list[tuple[list[int], list[int]]] = []

    def score(model: MemLong) -> float:
        seen.append((model.stored_layers, model.retrieval_layers))
        assert not model.trainable()
        layout = model.layout
        assert (layout.position, layout.memory_near, layout.memory_distance, layout.memory_reference) == (
            "fixed",
            7,
            99,
            None,
        )
        return float(len(seen))

    settings = ModelConfig(position="fixed", memory_near=7, memory_distance=99, memory_reference=None)
    scores = dict(sweep_layers(backbone, cells, score, settings))
    told = list(scores)
    assert seen == [([2], [2, 3]), ([2], [2]), ([2, 3], [2, 3]), ([3], [3])] and told == cells
    assert scores[LayerChoice(2, "own", (2,), "single")] == scores[LayerChoice(2, "own", (2,), "per_layer")] == 2.0
    assert backbone.config._attn_implementation == "sdpa"
    row = layer_table(scores, off=2.0)[0]
    assert row["ratio"] == 0.5 and row["retrieval_layers"] == "2-3" and row["source"] == "single"
    for wrong in ({"readers": ["all"]}, {"sources": ["both"]}, {"memory_layers": [9]}):
        args = {"memory_layers": [1], "readers": ["own"], "sources": ["single"]} | wrong
        with pytest.raises(UserError, match=next(iter(wrong))):
            layer_grid(**args, backbone=backbone)  # type: ignore[arg-type]
