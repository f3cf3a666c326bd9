"""Writing with a memory, inside transformers' own generate loop."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lightning_memlong.generation.local_context import LocalContext


class GenerateAdapter(GenerationMixin):
    """A local context as transformers' generate loop sees it: a model without a cache, given the whole text each time.

    Args:
        backbone: Its configuration is the loop's.
        context: Where the text goes.
    """

    main_input_name = "input_ids"

    def __init__(self, backbone: PreTrainedModel, context: LocalContext) -> None:
        self._backbone, self._context = backbone, context

    def __getattr__(self, name: str) -> Any:
        """Everything else is the backbone's."""
        return getattr(self._backbone, name)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        """Logits (B, 1, V) after a text (B, T)."""
        return CausalLMOutput(logits=self._context.logits(input_ids))

    __call__ = forward
