"""Evaluations of nothing are refused by name."""

from typing import Any

import pytest

from lightning_memlong.errors import UserError
from lightning_memlong.evaluation import EvictionGrid, InContextLearning, PerplexityGrid, RecallProbes

NOTHING: list[tuple[Any, dict[str, Any]]] = [
    (PerplexityGrid, {"corpora": {}}),
    (PerplexityGrid, {"corpora": {False: "books"}}),  # as YAML reads a name that is no
    (PerplexityGrid, {"lengths": []}),
    (InContextLearning, {"tasks": {}}),
    (InContextLearning, {"context": []}),
    (InContextLearning, {"memory": []}),
    (EvictionGrid, {"capacities": []}),
    (EvictionGrid, {"policies": {}}),
    (EvictionGrid, {"corpora": {}}),
    (EvictionGrid, {"windows": 0}),
    (RecallProbes, {"kinds": []}),
    (RecallProbes, {"lengths": []}),
    (RecallProbes, {"depths": []}),
]


@pytest.mark.parametrize(("evaluation", "given"), NOTHING)
def test_an_evaluation_of_nothing_is_refused_by_name(evaluation: Any, given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"evaluation.{next(iter(given))}=.*Fix: "):
        evaluation(**given)
