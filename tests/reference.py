"""Slow, loop-by-loop oracles. Nothing here is imported by the product."""

import math
from typing import Any

import torch
from torch import Tensor


def attention_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_mask: Tensor,
    fusion: str,
    gate: Tensor | None = None,
) -> Tensor:
    """Retrieval causal attention in float64, one query at a time.

    Shapes as in ``retrieval_causal_attention``; grouped queries read key/value head ``h // (H / H_kv)``.
    """
    rows, heads, tokens, size = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(rows, heads, tokens, size, dtype=torch.float64)
    for b in range(rows):
        for h in range(heads):
            for t in range(tokens):
                q = query[b, h, t].double()
                memory = [
                    (float(q @ memory_key[b, h // group, m].double()) / math.sqrt(size), memory_value[b, h // group, m])
                    for m in range(memory_key.shape[2])
                    if memory_mask[b, m]
                ]
                local = [
                    (float(q @ key[b, h // group, s].double()) / math.sqrt(size), value[b, h // group, s])
                    for s in range(t + 1)
                ]
                if fusion == "joint":
                    output[b, h, t] = weighted(memory + local)
                else:
                    assert gate is not None
                    output[b, h, t] = weighted(local)
                    if memory:
                        output[b, h, t] += gate[h].double() * weighted(memory)
    return output


def weighted(scored: list[tuple[float, Tensor]]) -> Tensor:
    """Softmax-weighted sum of values."""
    top = max(score for score, _ in scored)
    weights = [math.exp(score - top) for score, _ in scored]
    total = sum(weights)
    return sum((w / total) * v.double() for w, (_, v) in zip(weights, scored, strict=True))  # type: ignore[return-value]


class BankOracle:
    """One row of a memory bank as a plain Python list of dicts, oldest first."""

    def __init__(self, slots: int, capacity: int, policy: str) -> None:
        self.slots, self.capacity, self.policy = slots, capacity, policy
        self.entries: list[dict[str, Any]] = []

    def insert(self, chunks: list[dict[str, Any]]) -> None:
        """Append chunks, making room first."""
        chunks = [c for c in chunks if c["length"] > 0][-self.slots :]
        while len(self.entries) + len(chunks) > self.slots:
            drop = self._drops()
            self.entries = [e for i, e in enumerate(self.entries) if i not in drop]
        self.entries += [{**c, "counter": 0} for c in chunks]

    def _drops(self) -> set[int]:
        count, allowed = len(self.entries), 0.5 * self.capacity
        tokens = sum(e["length"] for e in self.entries)
        drop: set[int] = set()
        if self.policy == "retrieval_frequency":
            drop = set(range(int(0.1 * count)))
            tokens -= sum(self.entries[i]["length"] for i in drop)
            middle = range(int(0.1 * count), count - int(0.1 * count))
            order = sorted(middle, key=lambda i: (self.entries[i]["counter"], i))
        else:
            order = list(range(count))
        for i in order:
            if tokens <= allowed:
                break
            drop.add(i)
            tokens -= self.entries[i]["length"]
        return drop or set(order[:1])

    def search(self, query: Tensor, top_k: int, before: int | None) -> list[int]:
        """Places of the best entries, best first; ties go to the older one."""
        places = [i for i, e in enumerate(self.entries) if before is None or e["position"] + e["length"] <= before]
        return sorted(places, key=lambda i: (-float(self.entries[i]["embedding"] @ query), i))[:top_k]

    def count(self, places: list[int]) -> None:
        """Note a retrieval."""
        for i in places:
            self.entries[i]["counter"] += 1
