"""Writing with a memory, inside transformers' own generate loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutput

from lightning_memlong.backbone import text_config
from lightning_memlong.config import require
from lightning_memlong.errors import UserError

UNHEARD = ("guidance_scale", "output_attentions", "output_hidden_states")
"""Options of transformers' ``generate`` that need the network itself, not only its logits."""


class GenerateAdapter(GenerationMixin):
    """A text that grows as transformers' generate loop sees it: a model without a cache, given all of it each time.

    Args:
        backbone: Its configuration is the loop's.
        logits: Gives next-token logits (B, 1, V) after a text (B, T); ``goes_on``: the text is that of the call before
            and one token more, which nobody need look up.
    """

    main_input_name = "input_ids"

    def __init__(self, backbone: PreTrainedModel, logits: Callable[..., Tensor]) -> None:
        self._backbone, self._logits, self._begun = backbone, logits, False

    def __getattr__(self, name: str) -> Any:
        """Everything else is the backbone's."""
        return getattr(self._backbone, name)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        """Logits (B, 1, V) after a text (B, T)."""
        goes_on, self._begun = self._begun and len(input_ids) == 1, True  # several may change places
        return CausalLMOutput(logits=self._logits(input_ids, goes_on=goes_on))

    __call__ = forward


def loop_options(options: dict[str, Any], tokenizer: Any, ended: Callable[[], bool]) -> dict[str, Any]:
    """What transformers' ``generate`` is called with.

    Args:
        options: What was asked for.
        tokenizer: Knows stop strings.
        ended: Whether to end before the next token.

    Raises:
        UserError: For a cache, of which there is one, and what needs the network itself.
    """

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), ended(), device=ids.device)

    for name in UNHEARD:
        ok, allowed = options.get(name) in (None, False, 1), "what needs no second pass and no layer's own output"
        require(ok, name, options.get(name), allowed, "leave it out")
    options = {"use_cache": False, **options}
    allowed = "false: the local context is the cache"
    require(options["use_cache"] is False, "use_cache", options["use_cache"], allowed, "leave it out")
    if "stop_strings" in options:
        options.setdefault("tokenizer", tokenizer)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), stop])
    return options


def refused(error: Exception) -> UserError:
    """What transformers refuses, for people."""
    told = " ".join(str(error).split()) or type(error).__name__
    end = "" if told.endswith(".") else "."
    return UserError(f"generation: {told}{end} Allowed: options of transformers' generate. Fix: correct it.")


def rehearse(backbone: PreTrainedModel, tokenizer: Any, options: dict[str, Any]) -> None:
    """Write a token after nothing, with a model that says nothing: what is wrong with options shows before work begins.

    Args:
        backbone: Its configuration is the loop's.
        tokenizer: Knows stop strings.
        options: Of transformers' ``generate``.

    Raises:
        UserError: If they cannot be used.
    """
    device, size = backbone.device, text_config(backbone).vocab_size

    def logits(ids: Tensor, goes_on: bool = False) -> Tensor:
        return torch.zeros(len(ids), 1, size, device=ids.device)

    given = loop_options(options, tokenizer, lambda: True)
    try:
        # In a state of its own: what is drawn here is not to change what is drawn later.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            GenerateAdapter(backbone, logits).generate(torch.zeros(1, 1, dtype=torch.long, device=device), **given)
    except (ValueError, TypeError) as error:
        raise refused(error) from error
