"""Other models on the same footing: any causal language model of transformers, scored on the same bytes."""

import math
from typing import Any

import numpy as np
import torch

from lightning_memlong.backbone import Head, first_token, load_backbone, load_tokenizer, text_config
from lightning_memlong.errors import UserError
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.cost import token_bytes
from lightning_memlong.text import tokenise


class Peer:
    """A model given the context as plain text.

    Args:
        name: For messages.
        backbone: Its name, folder or hub id.
        device: Where to put it.

    Raises:
        UserError: If it cannot be loaded, or its logits cannot be made from its hidden states.
    """

    def __init__(self, name: str, backbone: str, device: torch.device) -> None:
        try:
            self.tokenizer: Any = load_tokenizer(backbone)
            self.model = load_backbone(backbone).eval().requires_grad_(False).to(device)  # type: ignore[arg-type]  # stub of `to`
        except UserError as error:
            raise UserError(str(error).replace("model.backbone=", f"evaluation.peers.{name}=")) from error
        self.longest: int | None = getattr(text_config(self.model), "max_position_embeddings", None)
        self.bos = first_token(self.tokenizer, None)
        self.name, self.device, self._head = name, device, Head(self.model)
        self._prove()

    @torch.no_grad()
    def _prove(self) -> None:
        """Losses are made from hidden states; that is the model's own way only if its logits come out."""
        ids = torch.arange(8, device=self.device)[None]
        wanted = self.model(input_ids=ids, use_cache=False).logits.float()
        made = self._head.logits(self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state).float()
        if not float((made - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max()):
            raise UserError(
                f"evaluation.peers.{self.name}: {type(self.model).__name__} does something to its logits that is not "
                "known here. Allowed: a linear head, scaled or soft-capped. Fix: leave it out."
            )

    def takes(self, length: int) -> bool:
        """Whether it was made for so many tokens."""
        return self.longest is None or length <= self.longest

    def held(self, length: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return length * token_bytes(self.model, element=self.model.dtype.itemsize)

    @torch.no_grad()
    def loss(self, tokens: np.ndarray, end: int, length: int, scored: int, subject: Subject) -> float:
        """Summed loss of the text of the tokens ``end - scored`` to ``end``, given those from ``end - length`` on.

        Both pieces of text are tokenised by the model's own tokenizer, one by one, so the scored bytes are the same.

        Raises:
            UserError: If the loss is not finite.
        """
        parts = tokens[max(0, end - length) : end - scored], tokens[max(0, end - length) : end]
        known, whole = (subject.tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts)
        # Cut out of the whole, since some tokenizers drop the space at the beginning of what they decode.
        texts = known, whole[len(known) :]
        # What a document spells like a special token is text, as it is for the model.
        before, after = (ids.tolist() for ids in tokenise(self.tokenizer, list(texts), control=False))
        if self.longest is not None:
            before = before[max(0, len(before) + len(after) + int(self.bos is not None) - self.longest) :]
        before = ([] if self.bos is None else [self.bos]) + before
        ids = torch.tensor([before + after], device=self.device)
        labels = ids.clone()
        labels[:, : len(before)] = -100
        with subject.autocast():
            # The head sees the scored places alone: logits of a long context would not fit.
            hidden = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, -len(after) - 1 :]
            losses = self._head.loss(hidden, labels[:, -len(after) - 1 :], reduction="none")
        total = float(losses.double().sum())
        if not math.isfinite(total):
            raise UserError(
                f"evaluation.peers.{self.name}: the loss of {len(after)} tokens is {total}. Allowed: a model with "
                "finite losses. Fix: run it in another --trainer.precision, or leave it out."
            )
        return total
