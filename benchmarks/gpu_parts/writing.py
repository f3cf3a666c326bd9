"""Part ``writing``: first token and tokens/s with a million tokens in memory, against ten thousand and a full cache."""

import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.generation import Clock
from benchmarks.gpu_parts.context import Context, PeakMemory, Row, attempt, free
from benchmarks.gpu_parts.models import SMOLLM2, TINY, Encoder, Numbers, decoder, with_memory
from benchmarks.paired import now
from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.memlong import MemLong

CHUNK, WINDOW, BLOCK = 128, 2048, 32768


def filled(model: MemLong, tokens: int, context: Context) -> MemoryBank:
    """A bank of random keys and values, as large as if so many tokens had been read."""
    bank, mixer = model.retrieval.new_bank(1, tokens + WINDOW), torch.Generator().manual_seed(context.seed)
    bank.provenance = model.long_context.provenance()
    shape = (len(model.stored_layers), 1, model.config.num_key_value_heads, 0, model.config.head_dim)
    for start in range(0, tokens, BLOCK):
        count = min(BLOCK, tokens - start)
        stored = torch.randn(*shape[:3], count, shape[4], device=context.device, dtype=context.dtype)
        chunks = count // CHUNK
        vectors = F.normalize(torch.randn(1, chunks, model.retrieval.retriever.size, generator=mixer), dim=-1)
        places = torch.arange(start, start + count, CHUNK)[None]
        bank.insert(stored, stored, vectors, torch.full((1, chunks), CHUNK), places)
    bank.row(0).append_tokens(torch.randint(5, 900, (tokens,), generator=mixer), 0)
    return bank


def prompt(context: Context, tokens: int) -> torch.Tensor:
    """(1, tokens) of random text."""
    return torch.randint(5, 900, (1, tokens), generator=torch.Generator().manual_seed(context.seed))


def written(model: MemLong, bank: MemoryBank, context: Context, count: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens/s after it."""
    marks: list[float] = []
    text, options = Numbers().decode(prompt(context, 64)[0]), {"min_new_tokens": count, "do_sample": False}
    now()
    begin = time.perf_counter()
    model.generate(text, bank, window=WINDOW, max_new_tokens=count, streamer=Clock(marks), **options)
    return marks[1] - begin, (count - 1) / (now() - marks[1])


def with_bank(context: Context) -> Iterator[Row]:
    """A long memory against a short one, turn about."""
    short, long = (2048, 8192) if context.tiny else (10_240, 2**20)
    count, rounds = (12, 2) if context.tiny else (128, 3)
    model = with_memory(TINY if context.tiny else SMOLLM2, context).eval()
    encoder = Encoder("tiny" if context.tiny else "MiniLM", context)
    config = MemoryConfig(chunk_size=CHUNK, top_k=3, retriever=RetrieverConfig("hashing"))
    model.use_memory(config, Numbers(), encoder)
    banks = {tokens: filled(model, tokens, context) for tokens in (short, long)}
    for bank in banks.values():
        written(model, bank, context, count)  # what is compiled and loaded is not counted
    times: dict[int, list[tuple[float, float]]] = {short: [], long: []}
    for number in range(rounds):
        for tokens in (short, long) if number % 2 else (long, short):
            times[tokens].append(written(model, banks[tokens], context, count))
        if context.clock.left <= 0:
            break
    first, speed = ({n: statistics.median(t[i] for t in each) for n, each in times.items()} for i in (0, 1))
    for tokens in (short, long):
        yield Row(
            f"{tokens:,} tokens in memory: first token", 1e3 * first[tokens], "ms", note="64 tokens of a question"
        )
        yield Row(f"{tokens:,} tokens in memory: tokens after it", speed[tokens], "tokens/s", note=f"{count} written")
    goal = None if context.tiny else 1.1
    yield Row(f"first token, {long:,} / {short:,} tokens", first[long] / first[short], "", goal)
    yield Row(f"time of a token, {long:,} / {short:,} tokens", speed[short] / speed[long], "", goal)
    stored = banks[long].stats()["tokens"] * len(model.stored_layers) * model.config.num_key_value_heads
    size = 2 * stored * model.config.head_dim * context.dtype.itemsize / 1e9
    yield Row(f"{long:,} tokens in memory: keys and values", size, "GB", note=f"{len(model.stored_layers)} layers")


def with_cache(context: Context, tokens: int) -> Iterator[Row]:
    """Plain transformers with so many tokens in its key/value cache."""
    count = 8 if context.tiny else 64
    model = decoder(TINY if context.tiny else SMOLLM2, context, positions=2**18).eval()
    ids, marks = prompt(context, tokens).to(context.device), []  # type: ignore[var-annotated]

    def write(inputs: torch.Tensor) -> float:
        now()
        begin = time.perf_counter()
        model.generate(inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=Clock(marks))
        return begin

    write(ids[:, :64])
    marks.clear()
    with PeakMemory(context) as peak:
        begin = write(ids)
        end = now()
    yield Row(f"plain model, {tokens:,} tokens in its cache: first token", 1e3 * (marks[1] - begin), "ms")
    yield Row(f"plain model, {tokens:,} tokens in its cache: tokens after it", (count - 1) / (end - marks[1]),
              "tokens/s", note=f"peak memory {peak.gb:.2f} GB")  # fmt: skip


def run(context: Context) -> Iterator[Row]:
    """Ours, then the plain model at growing lengths."""
    yield from attempt(context, "writing with a bank", partial(with_bank, context))
    for tokens in (256,) if context.tiny else (8192, 32768, 131072):
        free(context)
        yield from attempt(context, f"plain model, {tokens:,} tokens", partial(with_cache, context, tokens))
