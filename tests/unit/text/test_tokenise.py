"""Texts become tokens whole, and the tokenizer that does it stays as its owner left it."""

from pathlib import Path

import pytest

from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.text.tokenise import tokenise, tokenizer_digest


@pytest.mark.parametrize("padding", ["max_length", False])
def test_a_tokenizer_that_cuts_and_pads_still_does_so_afterwards(padding: str | bool, tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    digest = tokenizer_digest(tokenizer)
    tokenizer("kan", truncation=True, max_length=4, stride=1, padding=padding)
    backend = tokenizer.backend_tokenizer
    before = backend.truncation, backend.padding
    assert before[0]["max_length"] == 4 and (before[1] is not None) == bool(padding)
    assert len(tokenise(tokenizer, ["kan los " * 20])[0]) == 40
    assert (backend.truncation, backend.padding) == before
    assert tokenizer_digest(tokenizer) == digest, "how it cuts does not make it another tokenizer"
    assert (backend.truncation, backend.padding) == before
    with pytest.raises(TypeError):
        tokenise(tokenizer, [None])  # type: ignore[list-item]
    assert (backend.truncation, backend.padding) == before, "also after an error"


def test_tokens_that_are_added_later_are_seen(tiny_backbone: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    tokenise(tokenizer, ["kan"])
    tokenizer.add_tokens(["<new>"])
    assert tokenise(tokenizer, ["<new>"])[0].tolist() == tokenizer.convert_tokens_to_ids(["<new>"])
