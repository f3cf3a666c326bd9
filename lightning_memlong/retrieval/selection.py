"""Ways of selecting chunks: functions that name the entries a window's tokens will attend to.

A selector takes a :class:`Request` and returns scores (R, G, k), or None where it has none, and entries (R, G, k), -1
where there are fewer. To add one, write such a function and give its import path as ``--memory.selection
my_package.my_selector``, or add it to :data:`SELECTORS` here. It must not look at text that is yet to be predicted:
``request.queries()`` gives what is allowed to ask.

Legend: R rows, G sets of a row (1, or one a chunk of the window), Q queries of a set, k chunks, E embedding size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memlong.bank import BankView
from lightning_memlong.config import named_or_imported
from lightning_memlong.retrieval.queries import search_any


@dataclass(frozen=True)
class Request:
    """What is wanted of a bank."""

    bank: BankView
    """R rows."""
    top_k: int
    """Entries of a set."""
    groups: int
    """Sets of a row, G."""
    before: Tensor
    """(R,) only entries that end at or before this place in the document [tokens]."""
    after: Tensor | None
    """(R,) only entries that begin at or after this place; None: all."""
    queries: Callable[[], Tensor]
    """Gives the embeddings (R, G, Q, E) that ask, made only for selectors that want them."""
    seeds: Callable[[int], list[int]]
    """Gives a seed for each row, of a set (by number): a resumed run draws what an unbroken one would."""


Selector = Callable[[Request], tuple[Tensor | None, Tensor]]


def similarity(request: Request) -> tuple[Tensor | None, Tensor]:
    """The entries nearest to any of the queries (paper, section 2: retrieval)."""
    return search_any(request.bank, request.queries(), request.top_k, request.before, request.after)


def recent(request: Request) -> tuple[Tensor | None, Tensor]:
    """The entries stored last: a control."""
    places = request.bank.recent(request.top_k, request.before, request.after)
    return None, places[:, None].expand(-1, request.groups, -1)


def random(request: Request) -> tuple[Tensor | None, Tensor]:
    """Entries drawn without replacement: a control."""
    drawn = [
        request.bank.random(request.top_k, request.seeds(group), request.before, request.after)
        for group in range(request.groups)
    ]
    return None, torch.stack(drawn, dim=1)


SELECTORS: dict[str, Selector] = {"similarity": similarity, "recent": recent, "random": random}


def load_selector(name: str) -> Selector:
    """Find a selector by name or import path.

    Raises:
        UserError: If there is none.
    """
    return named_or_imported("memory.selection", name, SELECTORS)


def seed_of(*parts: int) -> int:
    """One seed for a place in the data, so that a resumed run draws what an unbroken one would."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed
