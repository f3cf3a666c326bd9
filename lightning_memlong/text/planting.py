"""Documents with something planted in them that is asked for at their end; the same for the same seed everywhere."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_memlong.config import require
from lightning_memlong.errors import UserError

KINDS = ("pass_key", "key_value", "passage")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "  # arXiv 2305.16300
WORDS = (
    "anchor apple arrow autumn barrel basket beacon blossom bottle bridge bronze butter candle canyon carpet castle "
    "cedar chimney circus clover copper corner cotton cradle crystal desert dragon eagle ember engine falcon feather "
    "fiddle forest fountain garden ginger glacier granite hammer harbor hazel helmet hollow honey island ivory jacket "
    "jungle kettle ladder lantern lemon lily lizard magnet maple marble meadow mirror mountain needle nickel oak ocean "
    "olive orchard otter oyster paddle panther parrot pebble pepper pigeon pillow planet plum pocket poplar prairie "
    "pumpkin quarry rabbit raven ribbon river rocket saddle salmon sapphire shadow silver spider spruce stable statue "
    "sugar summer sunset teapot temple thistle thunder timber torch tower trumpet tulip tunnel turtle valley velvet "
    "violet walnut whisper willow window winter wizard"
).split()
PAIRS = 5
"""Pairs of a ``key_value`` document: the one that is asked for, and others beside it that are not."""


@dataclass(frozen=True)
class Probe:
    """A document that ends with a question and its answer."""

    tokens: np.ndarray
    """(T,) the whole document."""
    planted: tuple[int, int]
    """Where what is asked for stands [tokens]."""
    changed: tuple[tuple[int, int], ...]
    """All places where the document is not its filler, before the question [tokens]."""
    question: int
    """Where the question begins."""
    answer: int
    """Where the answer begins; it ends with the document."""


def filler_tokens(path: str | None, count: int, tokenizer: Any, key: str) -> np.ndarray:
    """So many tokens of filler, repeated as often as needed.

    Args:
        path: A text file; None: the sentences of the pass-key task, which are the same everywhere.
        count: How many.
        tokenizer: The backbone's.
        key: The setting, for messages.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        text = NOISE * 64 if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{key}={path!r} cannot be read ({error}). Allowed: a text file, or null. Fix: correct the path."
        ) from error
    tokens = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    require(len(tokens) > 0, key, path, "a file with text in it", "choose another")
    return np.tile(tokens, -(-count // len(tokens)))[:count]


def plant(
    kind: str, length: int, depth: float, sample: int, filler: np.ndarray, tokenizer: Any, key: str = "lengths"
) -> Probe:
    """A document of exactly ``length`` tokens.

    What is planted takes the place of filler, so that all other tokens stand where they stand in every probe.

    Args:
        kind: pass_key: a number; key_value: one of several pairs of a word and a number; passage: words, whose first
            half is repeated at the end and whose second half is the answer.
        length: Tokens of the document.
        depth: Where in the filler it is planted, from 0 (the beginning) to 1 (right before the question).
        sample: Number of the draw.
        filler: (at least ``length``,) tokens.
        tokenizer: The backbone's.
        key: The setting that says the length, for messages.

    Raises:
        UserError: If the document is too short for it.
    """
    mixer = random.Random(f"{kind} {length} {depth} {sample}")
    needles, question, answer = _texts(kind, mixer)
    planted, asked, told = [_ids(tokenizer, n) for n in needles], _ids(tokenizer, question), _ids(tokenizer, answer)
    room = length - len(asked) - len(told)
    longest = max(map(len, planted))
    least = 2 * longest * len(planted) + len(asked) + len(told)
    require(
        length >= least, key, length, f"at least {least} tokens for a {kind} probe", "raise it, or leave the kind out"
    )
    tokens = np.concatenate([filler[:room], asked, told]).astype(np.int64)
    places = _places(room, [len(p) for p in planted], depth)
    for start, ids in zip(places, planted, strict=True):
        tokens[start : start + len(ids)] = ids
    spans = tuple((start, start + len(ids)) for start, ids in zip(places, planted, strict=True))
    return Probe(tokens, spans[0], spans, room, room + len(asked))


@dataclass(frozen=True)
class Fact:
    """Something planted in a text, which can be asked for at any place after it."""

    planted: tuple[int, int]
    """Where it stands [tokens]."""
    question: str
    """What asks for it."""
    asking: np.ndarray
    """(q,) tokens of the question."""
    answer: np.ndarray
    """(a,) tokens that are to follow."""


def plant_facts(
    kind: str, count: int, between: tuple[float, float], text: np.ndarray, seed: str, tokenizer: Any, key: str
) -> tuple[np.ndarray, list[Fact]]:
    """A text with facts planted in it, evenly spread over a part of it; they take the place of what stood there.

    Args:
        kind: key_value or passage, as for :func:`plant`; a pass key can be told from no other.
        count: How many facts.
        between: Depths of the text, from 0 to 1, that they stand between.
        text: (T,) tokens.
        seed: Of what is drawn.
        tokenizer: The backbone's.
        key: The setting that says how many, for messages.

    Returns:
        Tokens (T,), and the facts in their order.

    Raises:
        UserError: If there is no room for them.
    """
    mixer = random.Random(f"{kind} {seed}")
    require(count <= len(WORDS), key, count, f"at most {len(WORDS)}", "lower it")
    words = mixer.sample(WORDS, count)
    told = [_pair(w, mixer.randrange(10_000, 100_000)) if kind == "key_value" else _passage(mixer) for w in words]
    planted = [np.asarray(_ids(tokenizer, needle), dtype=np.int64) for needle, _, _ in told]
    begin, end = (round(depth * len(text)) for depth in between)
    most = (end - begin) // (2 * max(map(len, planted)))
    require(count <= most, key, count, f"at most {most} between depths of {len(text)} tokens", "lower it")
    tokens, facts = text.astype(np.int64), []
    for number, (ids, (_, question, answer)) in enumerate(zip(planted, told, strict=True)):
        start = begin + number * (end - begin) // count
        tokens[start : start + len(ids)] = ids
        asking, expected = (np.asarray(_ids(tokenizer, t), dtype=np.int64) for t in (question, answer))
        facts.append(Fact((start, start + len(ids)), question, asking, expected))
    return tokens, facts


def _texts(kind: str, mixer: random.Random) -> tuple[list[str], str, str]:
    """What is planted, first what is asked for, the question and the answer."""
    if kind == "pass_key":
        number = mixer.randrange(10_000, 100_000)
        text = f" The pass key is {number}. Remember it. {number} is the pass key."
        return [text], " What is the pass key? The pass key is", f" {number}"
    if kind == "key_value":
        words = mixer.sample(WORDS, PAIRS)
        numbers = [mixer.randrange(10_000, 100_000) for _ in words]
        pairs = [_pair(w, n) for w, n in zip(words, numbers, strict=True)]
        return [needle for needle, _, _ in pairs], *pairs[0][1:]
    needle, question, answer = _passage(mixer)
    return [needle], question, answer


def _pair(word: str, number: int) -> tuple[str, str, str]:
    """A word and its number: what is planted, the question and the answer."""
    question = f" What is the number of the {word}? The number of the {word} is"
    return f" The number of the {word} is {number}. Remember the {word}: {number}.", question, f" {number}"


def _passage(mixer: random.Random) -> tuple[str, str, str]:
    """Words: what is planted, its first half and its second."""
    words = [mixer.choice(WORDS) for _ in range(96)]
    return f" {' '.join(words)}.", " " + " ".join(words[:48]), " " + " ".join(words[48:]) + "."


def _places(room: int, lengths: list[int], depth: float) -> list[int]:
    """Where each needle begins: the first at its depth, the others in the middle of what is left, none on another."""
    places = [round(depth * (room - lengths[0]))]
    free = [(0, places[0]), (places[0] + lengths[0], room)]
    for length in lengths[1:]:
        begin, end = max(free, key=lambda gap: gap[1] - gap[0])
        free.remove((begin, end))
        middle = (begin + end - length) // 2
        places.append(middle)
        free += [(begin, middle), (middle + length, end)]
    return places


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
