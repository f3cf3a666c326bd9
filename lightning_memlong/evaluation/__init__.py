"""Evaluations; they return tables and print nothing."""

from lightning_memlong.evaluation.base import Evaluation
from lightning_memlong.evaluation.icl import InContextLearning
from lightning_memlong.evaluation.perplexity import PerplexityGrid
from lightning_memlong.evaluation.recall import RecallProbes

__all__ = ["Evaluation", "InContextLearning", "PerplexityGrid", "RecallProbes"]
