"""Eviction policies: pure functions that name the entries to drop when a bank row is full.

A policy takes, by name, what it wants to know of the N entries of a row, and returns the places of those to drop:
int64, without repetition, at least one.

| argument | what it is |
|---|---|
| ``counters`` | (N,) times retrieved; where ``memory.half_life`` is set, old retrievals count for less |
| ``ages`` | (N,) insertions since the entry was stored; 0 is the newest |
| ``idle`` | (N,) insertions since the entry was used or stored |
| ``scores`` | (N,) sum of the similarities it was retrieved with; decays like the counters |
| ``lengths`` | (N,) real tokens of the entry |
| ``capacity`` | size of the row [tokens] |

With ``memory.use`` attention, a retrieval counts by its share of the attention paid to all that was retrieved with it:
1 on average, and nothing where nothing looked at the entry, which was not used then either.

Keyword-only arguments are ``memory.policy_args``. To add a policy, write such a function and give its import path as
``--memory.policy my_package.my_policy``, or add it to :data:`POLICIES` here.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_memlong.config import named_or_imported
from lightning_memlong.errors import UserError

FACTS = ("counters", "ages", "idle", "scores", "lengths", "capacity")
Policy = Callable[[Mapping[str, Any]], Tensor]


def _drop_until(order: Tensor, lengths: Tensor, allowed_tokens: float) -> Tensor:
    """First entries of ``order`` whose removal leaves at most ``allowed_tokens`` tokens in the row."""
    excess = float(lengths.sum()) - allowed_tokens
    if excess <= 0:
        return order[:0]
    removed = lengths[order].cumsum(0)
    return order[: int((removed < excess).sum()) + 1]


def retrieval_frequency(
    counters: Tensor,
    ages: Tensor,
    lengths: Tensor,
    capacity: int,
    *,
    keep_newest: float = 0.1,
    drop_oldest: float = 0.1,
    target_fill: float = 0.5,
) -> Tensor:
    """The paper's dynamic memory update (section 2).

    The newest 10 % of entries are kept, the oldest 10 % dropped, and of the middle 80 % those with the lowest
    counters are dropped, older ones first among equals, until the row holds 50 % of its capacity.

    Worked example: ten chunks of 4 tokens, capacity 40, ages 9..0, counters ``[9, 0, 3, 0, 5, 1, 2, 7, 1, 0]``.
    Entry 0 goes for being oldest, entry 9 stays for being newest. Of 1..8 the row must lose four more to come
    down to 20 tokens: counters 0, 0, 1, 1 are entries 1, 3, 5, 8. Dropped: 0, 1, 3, 5, 8.

    Args:
        counters: (N,) times each entry was retrieved.
        ages: (N,) insertions since each entry was stored; 0 is the newest.
        lengths: (N,) tokens of each entry.
        capacity: Size of the row [tokens].
        keep_newest: Share of entries protected for being new.
        drop_oldest: Share of entries dropped for being old.
        target_fill: Share of ``capacity`` that may stay filled.
    """
    count = len(counters)
    oldest_first = torch.argsort(ages, descending=True, stable=True)
    start, stop = int(drop_oldest * count), count - int(keep_newest * count)
    oldest, middle = oldest_first[:start], oldest_first[start:stop]
    by_use = middle[torch.argsort(counters[middle], stable=True)]
    # The oldest go in any case, so what they free is no longer in excess.
    allowed = target_fill * capacity + float(lengths[oldest].sum())
    dropped = torch.cat([oldest, _drop_until(by_use, lengths, allowed)])
    return dropped if len(dropped) else by_use[:1]  # ragged chunks can fill all slots with few tokens


def fifo(counters: Tensor, ages: Tensor, lengths: Tensor, capacity: int, *, target_fill: float = 0.5) -> Tensor:
    """Drop the oldest entries until ``target_fill`` of the capacity is filled.

    With the default of one half this is what the reference code does, whatever the paper says of counters.
    """
    oldest_first = torch.argsort(ages, descending=True, stable=True)
    dropped = _drop_until(oldest_first, lengths, target_fill * capacity)
    return dropped if len(dropped) else oldest_first[:1]


def lru(idle: Tensor, lengths: Tensor, capacity: int, *, target_fill: float = 0.5) -> Tensor:
    """Drop what was retrieved (or, if never, stored) longest ago, until ``target_fill`` of the capacity is filled."""
    longest_idle = torch.argsort(idle, descending=True, stable=True)
    dropped = _drop_until(longest_idle, lengths, target_fill * capacity)
    return dropped if len(dropped) else longest_idle[:1]


def score(
    scores: Tensor, ages: Tensor, lengths: Tensor, capacity: int, *, keep_newest: float = 0.1, target_fill: float = 0.5
) -> Tensor:
    """Drop what gathered least similarity over its retrievals, until ``target_fill`` of the capacity is filled.

    The newest share of entries is kept: they had no time to be retrieved. Older ones go first among equals.
    """
    oldest_first = torch.argsort(ages, descending=True, stable=True)
    judged = oldest_first[: len(ages) - int(keep_newest * len(ages))]
    by_score = judged[torch.argsort(scores[judged], stable=True)]
    dropped = _drop_until(by_score, lengths, target_fill * capacity)
    return dropped if len(dropped) else by_score[:1]


def none(lengths: Tensor, capacity: int) -> Tensor:
    """Never drop anything: a document that does not fit stops the run.

    Raises:
        UserError: Always.
    """
    raise UserError(
        f"memory.policy='none': a row is full ({int(lengths.sum())} of memory.capacity={capacity} tokens) and nothing "
        "may be dropped. Allowed: documents that fit. Fix: raise --memory.capacity, cut documents with "
        "--data.max_document_tokens, or choose another policy."
    )


POLICIES: dict[str, Callable[..., Tensor]] = {
    "retrieval_frequency": retrieval_frequency,
    "fifo": fifo,
    "lru": lru,
    "score": score,
    "none": none,
}


def load_policy(name: str, policy_args: Mapping[str, Any] | None = None) -> Policy:
    """Find a policy by name or import path and bind its arguments; it is then called with all :data:`FACTS`.

    Raises:
        UserError: If there is no such policy, it wants to know what a bank does not know or does not take an
            argument, or a share is not in 0..1.
    """
    function = named_or_imported("memory.policy", name, POLICIES)
    args = dict(policy_args or {})
    parameters = inspect.signature(function).parameters.values()
    wanted = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unknown = [key for key in wanted if key not in FACTS]
    if unknown:
        raise UserError(
            f"memory.policy={name!r} asks for {', '.join(unknown)}. Allowed: {', '.join(FACTS)}; other arguments must "
            "be keyword-only. Fix: correct its signature; see lightning_memlong/bank/eviction.py."
        )
    _check_args(name, function, args, [p.name for p in parameters if p.kind is p.KEYWORD_ONLY])
    return partial(_scored, function, wanted, args)


def _scored(
    function: Callable[..., Tensor], wanted: Sequence[str], args: Mapping[str, Any], facts: Mapping[str, Tensor]
) -> Tensor:
    return function(*(facts[key] for key in wanted), **args)


def _check_args(name: str, function: Callable[..., Tensor], args: dict[str, Any], known: list[str]) -> None:
    for key, value in args.items():
        if key not in known:
            raise UserError(
                f"memory.policy_args: {name} does not take {key!r} (received {value!r}). "
                f"Allowed: {', '.join(known) or 'no argument'}. Fix: remove or rename it."
            )
        if function in POLICIES.values() and not (isinstance(value, int | float) and 0 <= value < 1):
            raise UserError(
                f"memory.policy_args.{key}={value!r} cannot be used. Allowed: a share from 0 up to but not "
                "including 1. Fix: for instance 0.1."
            )
    if args.get("keep_newest", 0.1) + args.get("drop_oldest", 0.1) >= 1 and name == "retrieval_frequency":
        raise UserError(
            f"memory.policy_args={args!r} cannot be used: keep_newest + drop_oldest leave no entry to choose from. "
            "Allowed: a sum below 1. Fix: lower one of them."
        )
