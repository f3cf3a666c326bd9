"""Which token stands before a window."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_memlong.backbone.loading import first_token
from lightning_memlong.errors import UserError


class Beginning:
    """A tokenizer that begins texts with token 5, or only could."""

    def __init__(self, begins: bool) -> None:
        self.bos_token_id, self.begins = 5, begins

    def __call__(self, text: str) -> object:
        return type("Encoded", (), {"input_ids": [5, 9] if self.begins else [9]})


def test_as_the_tokenizer_does_unless_asked_for() -> None:
    assert [first_token(Beginning(True), wanted) for wanted in (None, True, False)] == [5, 5, None]  # type: ignore
    assert [first_token(Beginning(False), wanted) for wanted in (None, True, False)] == [None, 5, None]  # type: ignore


def test_a_token_by_its_number(tiny_backbone: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    assert first_token(tokenizer, 1) == 1 and first_token(tokenizer, 0) == 0
    with pytest.raises(UserError, match="model.prepend_bos=9999.*a token from 0 to"):
        first_token(tokenizer, 9999)


def test_a_tokenizer_without_one(tiny_backbone: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_backbone)
    assert first_token(tokenizer, None) is None
    with pytest.raises(UserError, match="model.prepend_bos=True.*has none"):
        first_token(tokenizer, True)
