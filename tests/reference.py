"""Slow, loop-by-loop oracles. Nothing here is imported by the product."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

WAYS: list[dict[str, Any]] = [
    {"backend": "auto"}, {"backend": "sdpa"}, {"backend": "auto", "softcap": 3.0}, {"backend": "flex"},
]  # fmt: skip
"""Options of the attention under test, each taken by another kernel."""


def attention_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_mask: Tensor,
    fusion: str,
    gate: Tensor | None = None,
    local_mask: Tensor | None = None,
    softcap: float | None = None,
    memory_query: Tensor | None = None,
    memory_bias: Tensor | None = None,
    choice: tuple[int, int] | None = None,
    near: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Retrieval causal attention in float64, one query at a time.

    Shapes as in ``retrieval_causal_attention``; grouped queries read key/value head ``h // (H / H_kv)``, and the
    tokens of group g read memory row ``b * G + g``. ``local_mask`` (T, T) is boolean.
    ``choice``: tokens of a chunk, and how many chunks each query reads, those with most mass.
    ``near``: keys, values and mask of more memory, read with ``query`` and without bias.
    """
    rows, heads, tokens, size = query.shape
    group, groups = heads // key.shape[1], len(memory_key) // rows
    output = torch.zeros(rows, heads, tokens, size, dtype=torch.float64)

    def score(q: Tensor, k: Tensor) -> float:
        plain = float(q @ k.double()) / math.sqrt(size)
        return plain if softcap is None else softcap * math.tanh(plain / softcap)

    for b, h, t in itertools.product(range(rows), range(heads), range(tokens)):
        q, own = query[b, h, t].double(), b * groups + t // (tokens // groups)
        keys, values = memory_key[own, h // group], memory_value[own, h // group]
        asking = q if memory_query is None else memory_query[b, h, t].double()
        bias = 0.0 if memory_bias is None else float(memory_bias.expand(len(memory_key), -1)[own, h])
        real = [m for m in range(len(keys)) if memory_mask[own, m]]
        if choice is not None:
            mass = [0.0] * (len(keys) // choice[0])
            for m in real:
                mass[m // choice[0]] += math.exp(score(asking, keys[m]))
            best = sorted(range(len(mass)), key=lambda c: -mass[c])[: choice[1]]
            real = [m for m in real if m // choice[0] in best]
        memory = [(score(asking, keys[m]) + bias, values[m]) for m in real]
        if near is not None:
            beside = (t[own, h // group] for t in near[:2])
            memory += [(score(q, k), v) for k, v, m in zip(*beside, near[2][own], strict=True) if m]
        local = [
            (score(q, key[b, h // group, s]), value[b, h // group, s])
            for s in range(t + 1)
            if local_mask is None or local_mask[t, s]
        ]
        if fusion == "joint":
            output[b, h, t] = weighted(memory + local)
            continue
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

    def __init__(self, slots: int, capacity: int, policy: str, half_life: float | None = None) -> None:
        self.slots, self.capacity, self.policy, self.half_life = slots, capacity, policy, half_life
        self.entries: list[dict[str, Any]] = []
        self.serial = 0

    def clear(self) -> None:
        """Forget everything."""
        self.entries, self.serial = [], 0

    def insert(self, chunks: list[dict[str, Any]]) -> None:
        """Append chunks, making room first; counters and scores fade by one half every ``half_life`` chunks."""
        chunks = [c for c in chunks if c["length"] > 0]
        if not chunks:
            return
        while len(self.entries) + len(chunks) > self.slots:
            drop = self._drops()
            self.entries = [e for i, e in enumerate(self.entries) if i not in drop]
        for entry in self.entries:
            for name in ("counter", "score"):
                entry[name] *= 1 if self.half_life is None else 0.5 ** (len(chunks) / self.half_life)
        for chunk in chunks:
            self.entries.append({**chunk, "counter": 0, "score": 0.0, "used": self.serial})
            self.serial += 1

    def _drops(self) -> set[int]:
        count, allowed = len(self.entries), 0.5 * self.capacity
        tokens = sum(e["length"] for e in self.entries)
        drop: set[int] = set()
        order = list(range(count))
        if self.policy == "retrieval_frequency":
            drop = set(range(int(0.1 * count)))
            tokens -= sum(self.entries[i]["length"] for i in drop)
            middle = range(int(0.1 * count), count - int(0.1 * count))
            order = sorted(middle, key=lambda i: (self.entries[i]["counter"], i))
        elif self.policy == "lru":
            order.sort(key=lambda i: (self.entries[i]["used"], i))
        elif self.policy == "score":
            order = sorted(order[: count - int(0.1 * count)], key=lambda i: (self.entries[i]["score"], i))
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

    def count(self, places: list[int], query: Tensor) -> None:
        """Note a retrieval."""
        for i in places:
            self.entries[i]["counter"] += 1
            self.entries[i]["score"] += float(self.entries[i]["embedding"] @ query)
            self.entries[i]["used"] = self.serial - 1


def stored_as(chunk: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What a chunk (L, H, C, D) reads like after it was stored in an element type."""
    if dtype != torch.int8:
        return chunk if dtype is None else chunk.to(dtype)
    read = torch.zeros_like(chunk)
    for place in itertools.product(*(range(n) for n in chunk.shape[:3])):
        scale = max(float(chunk[place].abs().max()), 1e-12) / 127
        read[place] = (chunk[place] / scale).round() * scale
    return read


class SlowWriter:
    """A Llama with a memory, token by token in float64, without a cache of rotated keys: everything is turned anew.

    Args:
        backbone: A transformers Llama.
        reading: Layers that attend to memory.
    """

    def __init__(self, backbone: Any, reading: list[int]) -> None:
        self.backbone, self.reading = backbone.double(), reading
        self.kept: list[list[tuple[Tensor, Tensor]]] = []  # of each token, of each layer, unrotated key and value

    def logits(self, ids: Tensor, local: list[int], memory: dict[int, tuple[Tensor, Tensor]] | None) -> Tensor:
        """Next-token logits (V,) after reading token ``ids[-1]``.

        Args:
            ids: (T,), all tokens so far; those before the last were read before.
            local: Tokens that are seen, in the order of their positions; the last is the newest.
            memory: Layer -> unrotated keys and values (H_kv, M, D), right before the local tokens.
        """
        config, decoder = self.backbone.config, self.backbone.get_decoder()
        heads, shared, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            decoder.layers[0].self_attn.head_dim,
        )
        hidden = decoder.embed_tokens(ids[-1:])[0]
        self.kept.append([])
        for number, layer in enumerate(decoder.layers):
            normed, attention = layer.input_layernorm(hidden), layer.self_attn
            query = attention.q_proj(normed).view(heads, size)
            self.kept[-1].append(
                (attention.k_proj(normed).view(shared, size), attention.v_proj(normed).view(shared, size))
            )
            seen = [(i, *self.kept[t][number]) for i, t in enumerate(local)]
            if memory is not None and number in self.reading:
                keys, values = (t.double() for t in memory[number])
                count = keys.shape[1]
                seen += [(m - count, keys[:, m], values[:, m]) for m in range(count)]
            mixed = []
            for head in range(heads):
                group = head // (heads // shared)
                asked = self._turn(query[head], len(local) - 1)
                scored = [(float(asked @ self._turn(k[group], at)) / math.sqrt(size), v[group]) for at, k, v in seen]
                mixed.append(weighted(scored))
            hidden = hidden + attention.o_proj(torch.cat(mixed))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.backbone.lm_head(decoder.norm(hidden))

    def _turn(self, vector: Tensor, position: int) -> Tensor:
        half, theta = len(vector) // 2, self.backbone.config.rope_parameters["rope_theta"]
        angles = position * theta ** -(torch.arange(half, dtype=torch.float64) / half)
        cos, sin = torch.cat([angles.cos()] * 2), torch.cat([angles.sin()] * 2)
        return vector * cos + torch.cat([-vector[half:], vector[:half]]) * sin
