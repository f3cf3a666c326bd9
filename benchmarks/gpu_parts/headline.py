"""Part ``headline``: OpenLLaMA-3B's shape in the paper's setting, 80k tokens and a million, on one card."""

from collections.abc import Iterator

import numpy as np

from benchmarks.gpu_parts.context import Context, PeakMemory, Row, attempt, free
from benchmarks.gpu_parts.models import Encoder
from benchmarks.gpu_parts.training import Document, Memory, Tuned, fit
from benchmarks.long_document import CHUNK, TOP_K, WINDOW, build, speed
from benchmarks.paired import now
from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.generation import Span, evaluating, read_windows

CAPACITY = 32768
STEPS = 24
"""Training steps at the end of the long document."""


class Headline:
    """A model, an encoder, and what the first document has shown.

    Args:
        context: Where and how large.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.module = Tuned(build("tiny" if context.tiny else "openllama-3b", context.device.type))
        self.encoder = Encoder("tiny" if context.tiny else "bge-m3", context)
        self.vocabulary = self.module.model.config.vocab_size if not context.tiny else 1000
        # Tokens of the first document, where its speed is first looked at, and tokens of the second.
        self.sizes = (10_240, 4096, 8192) if context.tiny else (81_920, 16_384, 2**20)
        self.peak = self.early = 0.0

    def memory(self, capacity: int, storage: str) -> Memory:
        """The paper's memory settings, but for where and how many."""
        policy = "retrieval_frequency" if storage == "device" else "none"
        config = MemoryConfig(chunk_size=CHUNK, top_k=TOP_K, capacity=capacity, policy=policy, storage=storage,  # type: ignore[arg-type]
                              dtype="bfloat16", retriever=RetrieverConfig("hashing"))  # fmt: skip
        return Memory(config, self.encoder)

    def first(self) -> Iterator[Row]:
        """80k tokens, every one a training token, through a bank of the paper's size."""
        with PeakMemory(self.context) as peak:
            document = Document(self.vocabulary, WINDOW, 0, self.sizes[0] // WINDOW)
            seconds = fit(self.context, self.module, self.memory(CAPACITY, "device"), document)
        tokens = len(seconds) * WINDOW
        self.peak, goal = peak.gb, None if self.context.tiny else 16.0
        what = f"Trainer.fit, {tokens:,} tokens of one document"
        yield Row(f"{what}: peak memory", peak.gb, "GB", goal, note="allocated; encoder included")
        yield Row(f"{what}: peak memory, reserved", peak.reserved_gb, "GB", note="what the allocator holds")
        self.early, late = speed(seconds, self.sizes[1]), speed(seconds, tokens)
        yield Row(f"tokens/s up to {self.sizes[1]:,}", self.early, "tokens/s")
        if tokens < 0.75 * self.sizes[0]:
            yield Row("tokens/s at the end / early", status="stopped", note=f"time was over at {tokens:,} tokens")
            return
        yield Row(f"tokens/s at {tokens:,}", late, "tokens/s", note="median of 8 steps")
        yield Row(f"tokens/s at {tokens:,} / up to {self.sizes[1]:,}", late / self.early, "", 0.97, most=False)

    def second(self) -> Iterator[Row]:
        """A million tokens, most of them read without gradients, then training steps; K/V on the host."""
        total = self.sizes[2]
        memory = self.memory(total + STEPS * WINDOW, "host")
        with PeakMemory(self.context) as peak:
            bank, took = self._read(memory, total)
            end = int(bank.ends()[0])
            memory.banks["train"] = bank
            steps = 2 if self.context.tiny else STEPS
            seconds = fit(self.context, self.module, memory, Document(self.vocabulary, WINDOW, end, steps))
        note = f"{end:,} tokens read without gradients (MemLong.capture), then {len(seconds)} training steps"
        if end < total:
            note = f"time was over before all was read; {note}"
        yield Row("tokens in the bank, K/V on the host", bank.stats()["tokens"], "tokens", total, False, note=note)
        yield Row("evictions", bank.evictions, "chunks", 0)
        yield Row("reading without gradients", end / took, "tokens/s", note="encoder, bank and copies included")
        if self.peak:
            more, goal = peak.gb - self.peak, None if self.context.tiny else 0.5
            yield Row(f"peak memory at {end:,} tokens beyond that of the first document", more, "GB", goal)
        yield Row(f"peak memory at {end:,} tokens", peak.gb, "GB", note=f"reserved: {peak.reserved_gb:.2f} GB")
        late = speed(seconds, len(seconds) * WINDOW)
        yield Row(f"training at {end:,} tokens, K/V on the host", late, "tokens/s")
        if self.early:
            yield Row(
                f"tokens/s at {end:,}, host / early in the first document", late / self.early, "", 0.97, most=False
            )

    def _read(self, memory: Memory, total: int) -> tuple[MemoryBank, float]:
        """Read random tokens; stops early where time for the training steps would be lacking."""
        model, works = self.module.model, memory.retrieval(self.module)
        bank = works.new_bank(1)
        tokens = np.random.default_rng(self.context.seed).integers(5, self.vocabulary, total, dtype=np.int32)
        reserve, begin = 0.2 * self.context.clock.left, now()
        with evaluating(model):
            for _ in read_windows(model, works, bank, [Span(tokens)], WINDOW):
                if self.context.clock.left < reserve:
                    break
        return bank, now() - begin


def run(context: Context) -> Iterator[Row]:
    """Both documents."""
    context.clock.check()
    headline = Headline(context)
    free(context)
    yield from attempt(context, "80k tokens through Trainer.fit", headline.first)
    yield from attempt(context, "a million tokens, K/V on the host", headline.second)
