"""Part ``step``: a training step with memory on against off; where its milliseconds go, and who waits for the card."""

import statistics
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.gpu_parts.context import Context, Row, attempt, free
from benchmarks.gpu_parts.models import (
    LLAMA,
    OPENLLAMA,
    SMOLLM2,
    TINY,
    TINY_PAPER,
    Encoder,
    Numbers,
    Shape,
    with_memory,
)
from benchmarks.paired import now
from lightning_memlong.bank.storage import Where
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.memlong import MemLong
from lightning_memlong.retrieval import Retrieval
from lightning_memlong.text import to_device

CHUNK, HELD = 128, 16384
PAIRS, WARM = 9, 2
SETTINGS = [(1024, 8), (2048, 8), (1024, 32), (2048, 32)]
"""Window, top_k."""
SETTINGS_TINY = [(256, 2)]


class Parts:
    """Milliseconds by part of a step; the card is waited for at both ends of each, but only while ``on``."""

    def __init__(self) -> None:
        self.on, self.seconds = False, Counter[str]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a block."""
        if not self.on:
            yield
            return
        begin = now()
        yield
        self.seconds[name.removeprefix("memory.")] += now() - begin


class Step:
    """Everything in a training step: retriever, search, gather, attention, backward pass, optimiser, insertion.

    Args:
        model: The model.
        encoder: The retriever.
        window: Tokens of a step.
        top_k: Chunks retrieved.
        context: Where.
        storage: Where keys and values lie.
    """

    def __init__(
        self, model: MemLong, encoder: Encoder, window: int, top_k: int, context: Context, storage: Where = "device"
    ) -> None:
        self.model, self.window, self.context, self.parts = model.train(), window, context, Parts()
        config = MemoryConfig(
            chunk_size=CHUNK, top_k=top_k, capacity=2 * HELD, storage=storage, retriever=RetrieverConfig("hashing")
        )
        self.works = Retrieval(config, encoder, Numbers(), self.parts)
        self.bank = self.works.new_bank(1)
        self.optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-6)
        self.place, self._mixer = 0, torch.Generator().manual_seed(context.seed)
        self._fill()

    def _fill(self) -> None:
        """Random keys and values of the right shape, in the bank's first half."""
        config, device = self.model.config, self.context.device
        layers = len(self.model.stored_layers) if self.model.layout.source == "per_layer" else 0
        shape = (1, config.num_key_value_heads, HELD, config.head_dim)
        stored = torch.randn((layers, *shape) if layers else shape, device=device, dtype=self.context.dtype)
        count = HELD // CHUNK
        vectors = F.normalize(torch.randn(1, count, self.works.retriever.size, generator=self._mixer), dim=-1)
        starts = torch.arange(0, HELD, CHUNK)[None]
        self.bank.insert(stored, stored, vectors, torch.full((1, count), CHUNK), starts)
        self.place = HELD

    def __call__(self, memory: bool) -> float:
        """Seconds of a step."""
        ids = torch.randint(5, 900, (1, self.window), generator=self._mixer)
        begin, part = now(), self.parts
        with part("batch to the device"):
            facts = {"length": self.window, "document_id": 0, "offset": self.place, "overlap": 0}
            batch = {name: torch.tensor([value]) for name, value in facts.items()}
            batch = to_device({**batch, "input_ids": ids}, self.context.device)
        found = None
        if memory:
            found = self.works.retrieve(self.bank, batch)
            self.works.embed_ahead(batch)
        with part("forward"):
            output = self.model(batch["input_ids"], batch["input_ids"], memory=found)
        with part("backward"):
            output.loss.backward()
        with part("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.trainable().values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if memory:
            self.works.store(self.bank, {"keys": output.keys, "values": output.values}, batch)
            self.place += self.window
        return now() - begin


def compare(step: Step, name: str, pairs: int) -> Iterator[Row]:
    """On against off, turn about."""
    for _ in range(WARM):
        step(True), step(False)
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(pairs):
        for memory in (True, False) if number % 2 else (False, True):
            times[memory].append(step(memory))
        if step.context.clock.left <= 0 and number >= 2:
            break
    ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
    on, off = (1e3 * statistics.median(times[memory]) for memory in (True, False))
    goal = None if step.context.tiny else 1.10
    yield Row(f"{name}: memory on / off", ratio, "", goal, note=f"{on:.2f} ms / {off:.2f} ms, {len(times[True])} pairs")


def breakdown(step: Step, name: str, count: int) -> Iterator[Row]:
    """Medians are of whole steps; parts are means, each waited for, so that their sum is a little more than a step."""
    step.parts.on = True
    totals = {}
    for memory in (True, False):
        step.parts.seconds.clear()
        for _ in range(count):
            step(memory)
        totals[memory] = {k: 1e3 * v / count for k, v in step.parts.seconds.items()}
    step.parts.on = False
    for part, value in sorted(totals[True].items(), key=lambda item: -item[1]):
        without = totals[False].get(part)
        yield Row(f"{name}: {part}", value, "ms", note="" if without is None else f"memory off: {without:.2f} ms")


def blocking(step: Step, name: str) -> Iterator[Row]:
    """How often a step waits for the card, and where; each place is the innermost line of ours."""
    if not step.context.cuda:
        yield Row(f"{name}: times a step waits for the card", status="skipped", note="there is no card")
        return
    found: dict[bool, Counter[str]] = {}
    for memory in (True, False):
        with _counted(step.context.root) as found[memory]:
            step(memory)
    total, off = (sum(found[memory].values()) for memory in (True, False))
    yield Row(f"{name}: times a step waits for the card", total, "times", note=f"memory off: {off}")
    for place, times in found[True].most_common(12):
        yield Row(f"{name}: waits at {place}", times, "times", note=f"memory off: {found[False][place]}")


@contextmanager
def _counted(root: Path) -> Iterator[Counter[str]]:
    """Count PyTorch's warnings about synchronising operations by the line of ours that led there."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, category: type[Warning], file: str, number: int, *_: object) -> None:
        beside = threading.current_thread() is not threading.main_thread()  # warnings are of all threads
        if beside or "synchronizing CUDA operation" not in str(message):
            return
        ours = [f for f in traceback.extract_stack() if f.filename.startswith(str(root / "lightning_memlong"))]
        where = f"{Path(ours[-1].filename).relative_to(root)}:{ours[-1].lineno}" if ours else "outside the package"
        places[f"{where} `{(ours[-1].line or '')[:70] if ours else ''}`"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def measured(
    context: Context, shape: Shape, model: MemLong, encoder: Encoder, window: int, top_k: int, kernels: str
) -> Iterator[Row]:
    """One setting; the first of each shape in detail."""
    name = f"{shape.name}, W = {window:,}, k = {top_k}" + ("" if kernels == "auto" else f", {kernels}")
    model.contexts.layout = replace(model.contexts.layout, attention=kernels)
    step = Step(model, encoder, window, top_k, context)
    yield from compare(step, name, 3 if context.tiny else PAIRS)
    if (window, top_k) in (SETTINGS[0], *SETTINGS_TINY) and kernels == "auto":
        yield from breakdown(step, name, 2 if context.tiny else 5)
        yield from blocking(step, name)
        elsewhere = Step(model, encoder, window, top_k, context, "host")
        yield from compare(elsewhere, f"{name}, K/V on the host", 3 if context.tiny else PAIRS)
        yield from blocking(elsewhere, f"{name}, K/V on the host")


def run(context: Context) -> Iterator[Row]:
    """Each shape in each setting."""
    shapes = (TINY, TINY_PAPER) if context.tiny else (SMOLLM2, OPENLLAMA, LLAMA)
    for shape in shapes:
        context.clock.check()
        begin = time.monotonic()
        try:
            model, encoder = with_memory(shape, context), Encoder(shape.encoder, context)
        except Exception as error:
            yield Row(shape.name, status="failed", note=str(error)[:300])
            continue
        yield Row(
            f"{shape.name}: made in",
            time.monotonic() - begin,
            "s",
            note=f"{model.layout.source}, {model.layout.fusion}",
        )
        for window, top_k in SETTINGS_TINY if context.tiny else SETTINGS:
            for kernels in ("auto", "sdpa"):
                one = partial(measured, context, shape, model, encoder, window, top_k, kernels)
                yield from attempt(context, f"{shape.name}, W = {window}, k = {top_k}, {kernels}", one)
        del model, encoder, one
        free(context)
