"""EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness): our adapter for it, and its RULER for us.

Importing it registers the adapter. What does not fit the window is read into memory; what does is read as any model
reads it, so that short tasks score as the backbone does.
"""

from lightning_memlong.lm_eval.adapter import MemLongLM, tasks_with_our_tokenizers
from lightning_memlong.lm_eval.ruler import Ruler

__all__ = ["MemLongLM", "Ruler", "tasks_with_our_tokenizers"]
