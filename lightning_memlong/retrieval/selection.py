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
    newest: int = 0
    """Of ``top_k``, those that ``mix`` takes for being the newest."""


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
    """The newest entries, and of the others those nearest to a query."""
    scores, entries = similarity(request)
    newest = request.bank.recent(request.newest, request.before, request.after)

    def ordered(row: int, hits: list[int]) -> list[int]:
        return [*(e for e in newest[row].tolist() if e >= 0), *hits]

    return _first(request, scores, entries, ordered)


def neighbours(request: Request) -> tuple[Tensor | None, Tensor]:
    """The entries nearest to a query, each with what stands right before and after it in the document.

    What is said next to a passage is often what one looks for (EM-LLM, arXiv 2407.09450: the contiguity buffer).
    """
    scores, entries = similarity(request)
    bank = request.bank
    eligible = [set(row.tolist()) for row in bank.recent(bank.slots, request.before, request.after)]

    def ordered(row: int, hits: list[int]) -> list[int]:
        begins = bank.entries(row).positions.tolist()

        def beside(hit: int) -> list[int]:
            return [
                e for e in (hit - 1, hit + 1)
                if e >= 0 and e in eligible[row] and abs(begins[e] - begins[hit]) <= bank.chunk_size
            ]  # fmt: skip

        return [e for hit in hits for e in (hit, *beside(hit))]

    return _first(request, scores, entries, ordered)


def _first(
    request: Request, scores: Tensor, entries: Tensor, ordered: Callable[[int, list[int]], list[int]]
) -> tuple[Tensor, Tensor]:
    """Of what ``ordered`` makes of a row's hits, best first, the first ``top_k``, none twice.

    Scores are those of hits; NaN for what was chosen for another reason.
    """
    rows, groups, _ = entries.shape
    kept = torch.full((rows, groups, request.top_k), -1)
    found = torch.full(kept.shape, float("nan"))
    for row in range(rows):
        for group in range(groups):
            known = dict(zip(entries[row, group].tolist(), scores[row, group].tolist(), strict=True))
            hits = [e for e in known if e >= 0]
            chosen = list(dict.fromkeys(ordered(row, hits)))[: request.top_k]
            kept[row, group, : len(chosen)] = torch.tensor(chosen, dtype=torch.long)
            found[row, group, : len(chosen)] = torch.tensor([known.get(e, float("nan")) for e in chosen])
    return found, kept


SELECTORS: dict[str, Selector] = {
    "similarity": similarity, "recent": recent, "random": random, "mix": mix, "neighbours": neighbours,
}  # fmt: skip


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
