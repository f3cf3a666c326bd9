"""What is planted in documents, and where."""

import numpy as np
import pytest

from lightning_memlong.errors import UserError
from lightning_memlong.text.planting import KINDS, PAIRS, filler_tokens, plant, plant_facts


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def text_of(tokens: np.ndarray) -> str:
    return bytes(tokens.tolist()).decode()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_documents_have_their_length_and_everything_in_its_place(kind: str, depth: float) -> None:
    filler = filler_tokens(None, 4096, Bytes(), "filler")
    probe = plant(kind, 4096, depth, 1, filler, Bytes())
    assert len(probe.tokens) == 4096
    needle, answer = text_of(probe.tokens[slice(*probe.planted)]), text_of(probe.tokens[probe.answer :])
    assert answer.strip() in needle
    assert len(probe.changed) == (PAIRS if kind == "key_value" else 1)
    room = probe.question - (probe.planted[1] - probe.planted[0])
    assert probe.planted[0] == round(depth * room)
    untouched = np.ones(probe.question, bool)
    for start, end in probe.changed:
        assert untouched[start:end].all(), "nothing is planted on something planted"
        untouched[start:end] = False
    assert (probe.tokens[: probe.question][untouched] == filler[: probe.question][untouched]).all()


def test_the_asked_pair_is_the_only_one_with_its_word() -> None:
    filler = filler_tokens(None, 4096, Bytes(), "filler")
    probe = plant("key_value", 4096, 0.5, 3, filler, Bytes())
    needles = [text_of(probe.tokens[a:b]) for a, b in probe.changed]
    word = text_of(probe.tokens[probe.question : probe.answer]).split()[-2]
    assert sum(f"the {word} is" in n for n in needles) == 1


def test_draws_are_the_same_and_differ() -> None:
    filler = filler_tokens(None, 2048, Bytes(), "filler")
    one, same, other = (plant("pass_key", 2048, 0.5, n, filler, Bytes()).tokens for n in (0, 0, 1))
    assert (one == same).all() and (one != other).any()


def test_what_cannot_be_planted_is_told() -> None:
    filler = filler_tokens(None, 64, Bytes(), "filler")
    with pytest.raises(UserError, match="lengths=64"):
        plant("passage", 64, 0.5, 0, filler, Bytes())
    with pytest.raises(UserError, match="evaluation.filler='/nowhere'"):
        filler_tokens("/nowhere", 10, Bytes(), "evaluation.filler")


@pytest.mark.parametrize("kind", ["key_value", "passage"])
def test_facts_stand_where_they_are_said_to_and_nothing_else_changes(kind: str) -> None:
    text = filler_tokens(None, 60_000, Bytes(), "filler")
    tokens, facts = plant_facts(kind, 3, (0.1, 0.2), text, "a book", Bytes(), "facts")
    untouched = np.ones(len(text), bool)
    for fact, start in zip(facts, (6000, 8000, 10_000), strict=True):
        needle = text_of(tokens[slice(*fact.planted)])
        assert fact.planted[0] == start and text_of(fact.answer).strip(" .") in needle
        assert text_of(fact.asking) == fact.question and text_of(fact.asking) not in needle[-40:]
        untouched[slice(*fact.planted)] = False
    assert (tokens[untouched] == text[untouched]).all() and (tokens[~untouched] != text[~untouched]).any()
    assert len({text_of(fact.answer) for fact in facts}) == 3
    again, _ = plant_facts(kind, 3, (0.1, 0.2), text, "a book", Bytes(), "facts")
    other, _ = plant_facts(kind, 3, (0.1, 0.2), text, "another", Bytes(), "facts")
    assert (again == tokens).all() and (other != tokens).any()


def test_facts_without_room_are_told() -> None:
    text = filler_tokens(None, 2000, Bytes(), "filler")
    with pytest.raises(UserError, match="facts=3 cannot be used. Allowed: at most 1 "):
        plant_facts("key_value", 3, (0.0, 0.1), text, "a book", Bytes(), "facts")
