"""Part ``attention``: joint attention by each backend against one plain flash call over as many keys."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu_parts.context import Context, Row, attempt
from benchmarks.paired import paired
from lightning_memlong.attention import retrieval_causal_attention

HEADS, ROUNDS, REPEATS = 32, 7, 5
SIZES = (64, 100, 128)
Way = Callable[[], None]


def ways(
    context: Context, size: int, memory: int, tokens: int, heads: int, backends: tuple[str, ...], train: bool
) -> dict[str, Way]:
    """The backends, and what they are compared with: the same keys, seen by the same queries, in one causal call."""

    def tensor(count: int) -> Tensor:
        return torch.randn(1, heads, count, size, device=context.device, dtype=context.dtype)

    query, key, value = (tensor(tokens).requires_grad_(train) for _ in range(3))
    memory_key, memory_value = tensor(memory), tensor(memory)
    keys, values = (torch.cat([m, t.detach()], dim=2).requires_grad_(train)
                    for m, t in ((memory_key, key), (memory_value, value)))  # fmt: skip
    repeats = REPEATS if context.cuda else 1  # one call is too short to be timed alone

    def repeated(call: Callable[[], Tensor]) -> Way:
        def way() -> None:
            for _ in range(repeats):
                output = call()
                if train:
                    output.sum().backward()

        return way

    found = {
        backend: repeated(partial(retrieval_causal_attention, query, key, value, memory_key, memory_value,
                                  backend=backend))
        for backend in backends
    }  # fmt: skip
    bias = causal_lower_right(tokens, memory + tokens)
    return found | {"plain": repeated(lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=bias))}


def measured(
    context: Context, size: int, memory: int, tokens: int, heads: int, backends: tuple[str, ...], train: bool
) -> Iterator[Row]:
    """Time them turn about."""
    found = ways(context, size, memory, tokens, heads, backends, train)
    seconds, ratios = paired(found, 3 if context.tiny else ROUNDS)
    each = 1e3 / (REPEATS if context.cuda else 1)
    what = "forward and backward" if train else "forward"
    for backend in backends:
        note = f"{seconds[backend] * each:.3f} ms / {seconds['plain'] * each:.3f} ms"
        goal = None if context.tiny else 1.10
        yield Row(f"head size {size}, M = {memory:,}, {what}: {backend} / plain", ratios[backend], "", goal, note=note)


def run(context: Context) -> Iterator[Row]:
    """Each head size, memory and pass; FlexAttention afterwards, as it is compiled for each."""
    tokens, heads = (64, 4) if context.tiny else (1024, HEADS)
    memories, sizes = ((64,), (32,)) if context.tiny else ((1024, 4096), SIZES)
    passes = (False, True)
    cases = [(s, m, t, each) for m in memories for s in sizes for t in passes for each in (("two_part",), ("sdpa",))]
    if context.cuda:
        cases += [(s, memories[0], t, ("flex",)) for s in (128, 64, 100) for t in passes]
    for size, memory, train, backends in cases:
        name = f"head size {size}, M = {memory}, {' and '.join(backends)}"
        one = partial(measured, context, size, memory, tokens, heads, backends, train)
        yield from attempt(context, name, one)
