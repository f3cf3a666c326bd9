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
    newest: int
    """Of the top_k, how many ``mix`` takes for being new."""
    queries: Callable[[], Tensor]
    """Gives the embeddings (R, G, Q, E) that ask, made only for selectors that want them."""
    seeds: Callable[[int], list[int]]
    """Gives a seed for each row, of a set (by number): a resumed run draws what an unbroken one would."""


Selector = Callable[[Request], tuple[Tensor | None, Tensor]]


def similarity(request: Request) -> tuple[Tensor, Tensor]:
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


def mix(request: Request) -> tuple[Tensor | None, Tensor]:
    """The entries stored last, and the nearest of the others."""
    newest = request.bank.recent(request.newest, request.before, request.after).tolist()
    return _by_preference(request, lambda row, hits: [*newest[row], *hits])


def neighbours(request: Request) -> tuple[Tensor | None, Tensor]:
    """The nearest entries, each with those beside it in the document (contiguity; EM-LLM, arXiv 2407.09450)."""
    beside = [_beside(request, row) for row in range(request.bank.rows)]
    return _by_preference(request, lambda row, hits: [place for hit in hits for place in (hit, *beside[row](hit))])


SELECTORS: dict[str, Selector] = {
    "similarity": similarity,
    "recent": recent,
    "random": random,
    "mix": mix,
    "neighbours": neighbours,
}
CONTROL_SELECTIONS = ("recent", "random")
"""Those that ask nothing."""


def load_selector(name: str) -> Selector:
    """Find a selector by name or import path.

    Raises:
        UserError: If there is none.
    """
    return named_or_imported("memory.selection", name, SELECTORS)


def _beside(request: Request, row: int) -> Callable[[int], list[int]]:
    """Gives the places of the entries directly before and after one of a row, as far as they may be chosen."""
    entries = request.bank.entries(row)
    before, after = int(request.before[row]), None if request.after is None else int(request.after[row])
    eligible = request.bank.row(row).eligible(before, after)
    joined = (entries.positions + entries.lengths)[:-1] == entries.positions[1:]
    joined &= eligible[:-1] & eligible[1:]  # (N - 1,) an entry and the next one

    def beside(place: int) -> list[int]:
        previous = [place - 1] if place > 0 and joined[place - 1] else []
        return [*previous, place + 1] if place < len(joined) and joined[place] else previous

    return beside


def _by_preference(request: Request, preferred: Callable[[int, list[int]], list[int]]) -> tuple[Tensor, Tensor]:
    """The first ``top_k`` of lists of places, each once, with their similarities.

    Args:
        request: What is wanted.
        preferred: Makes such a list, best first, of a row's number and the places nearest to its queries, best first;
            -1 and what stands in it already are passed over.
    """
    queries = request.queries()
    _, found = search_any(request.bank, queries, request.top_k, request.before, request.after)
    entries = found.new_full((*found.shape[:2], request.top_k), -1)
    scores = torch.full(entries.shape, float("nan"))
    for row in range(len(entries)):
        embeddings = request.bank.entries(row).embeddings
        for group, hits in enumerate(found[row].tolist()):
            wanted = dict.fromkeys(preferred(row, [hit for hit in hits if hit >= 0]))
            chosen = torch.tensor([place for place in wanted if place >= 0][: request.top_k], dtype=torch.long)
            entries[row, group, : len(chosen)] = chosen
            # As similar as to the nearest query; an index has scores only for what it finds.
            scores[row, group, : len(chosen)] = (embeddings[chosen] @ queries[row, group].T).amax(dim=1)
    widest = int((entries >= 0).sum(-1).max())
    return scores[..., :widest], entries[..., :widest]


def seed_of(*parts: int) -> int:
    """One seed for a place in the data, so that a resumed run draws what an unbroken one would."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed
