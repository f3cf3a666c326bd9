"""``train.py fit`` with use counted by attention: what is counted, resumed, evicted and refused."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.memory_bank import MemoryBankCallback
from lightning_memlong.cli.main import MemLongCLI, main
from lightning_memlong.memlong import MemLong
from tests.integration.helpers import ROOT, differences, tiny

FILE = str(ROOT / "conf" / "ablations" / "use_attention.yaml")
QUICK = ["--validate_first", "false", "--trainer.limit_val_batches", "2", "--data.batch_size", "2"]


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    known = tiny(tiny_backbone, text_folder, tmp_path / "runs")
    return [*known[:2], "--config", FILE, *known[2:], *QUICK]


def bank_of(cli: MemLongCLI) -> MemoryBankCallback:
    return next(c for c in cli.trainer.callbacks if isinstance(c, MemoryBankCallback))


class Counted(L.Callback):
    """Notes, of each window, how much counters went up, and how much retrievals would have counted."""

    def __init__(self) -> None:
        self.found: list[tuple[float, int]] = []
        self.shares: list[torch.Tensor] = []
        self.validated = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: dict[str, Any], *_: Any) -> None:
        count_use = MemoryBankCallback.retrieval(self._bank(trainer), pl_module).count_use

        def noted(bank: Any, memory: Any, use: Any) -> None:
            before = self._counters(bank)
            count_use(bank, memory, use)
            wanted = 0 if memory is None else int((memory.entries >= 0).sum())
            self.found.append((float(self._counters(bank) - before), wanted))
            self.shares += [] if use is None else [use]

        if not self.found:
            self._bank(trainer).retrieval(pl_module).count_use = noted  # type: ignore[method-assign]  # of this run's own object

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.validated = float(self._counters(self._bank(trainer).banks["val"]))

    def _bank(self, trainer: Any) -> MemoryBankCallback:
        return next(c for c in trainer.callbacks if isinstance(c, MemoryBankCallback))

    def _counters(self, bank: Any) -> torch.Tensor:
        return sum((bank.entries(row).counters.sum() for row in range(bank.rows)), torch.zeros(()))


COUNTED = "--trainer.callbacks+=tests.integration.test_use.Counted"
WAYS = {
    "plain": [],
    "chunk": ["--memory.granularity", "chunk"],
    "masked": ["--model.attention", "sdpa"],
    "gated": ["--model.fusion", "gated", "--model.gradient_checkpointing", "true"],
    "fixed": ["--model.position", "fixed", "--memory.candidates", "5", "--model.gradient_checkpointing", "true"],
    "distractors": ["--memory.distractors", "1", "--model.loss_weights", "long_context", "--trainer.precision",
                    "bf16-mixed"],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_each_window_counts_once_for_what_it_retrieved(way: str, options: list[str]) -> None:
    more = [*WAYS[way], "--trainer.accumulate_grad_batches", "2", COUNTED]
    cli = MemLongCLI(["fit", *options, *more])
    seen = next(c for c in cli.trainer.callbacks if isinstance(c, Counted))
    assert len(seen.found) == 8 + 4 and seen.shares, "windows of 4 steps and of two validations"
    asked = [wanted for _, wanted in seen.found]
    # Gates are shut until the first step is done: what nobody reads is not used.
    assert all(got == pytest.approx(wanted, rel=1e-6) for got, wanted in seen.found[2:]) and max(asked) > 0
    assert all(bool((share >= 0).all()) and float(share.sum(1).max()) <= 1 for share in seen.shares) or way == "gated"
    held = [bank_of(cli).banks["train"].entries(row) for row in range(2)]
    counters = torch.cat([entries.counters for entries in held])
    assert bool((counters % 1 != 0).any()) and seen.validated > 0


def test_a_stopped_run_goes_on_exactly_and_its_bank_is_another_one(options: list[str], tmp_path: Path) -> None:
    found = []
    for name, stops, more in (
        ("whole", ["6"], []), ("stopped", ["3", "6"], []), ("retrieved", ["6"], ["--memory.use", "retrieved"]),
    ):  # fmt: skip
        for number, steps in enumerate(stops):
            args = ["fit", *options, *more, "--model.scheduler.total_steps", "6", "--trainer.max_steps", steps]
            args += ["--trainer.logger.save_dir", str(tmp_path / name), *(["--ckpt_path", "last"] if number else [])]
            assert main(args) == 0
        found.append(torch.load(next((tmp_path / name).rglob("last.ckpt")), weights_only=True))
    banks = [next(v for k, v in c["callbacks"].items() if "MemoryBank" in k) for c in found]
    assert differences(banks[0], banks[1]) == [] and differences(found[0]["state_dict"], found[1]["state_dict"]) == []
    assert any("counters" in place for place in differences(banks[0], banks[2]))


def test_what_is_read_into_a_small_bank_counts_too(options: list[str], tmp_path: Path) -> None:
    backbone = options[options.index("--model.backbone") + 1]
    text = next(Path(options[options.index("--data.path") + 1]).glob("*.txt")).read_text()
    for source in ("per_layer", "single"):
        memory = {"chunk_size": 16, "top_k": 3, "use": "attention", "retriever": {"name": "hashing"}}
        model = MemLong.from_pretrained(backbone, memory=memory, memory_layer=1, source=source)
        bank = model.read(text, window=64, capacity=256, progress=False)
        counters = bank.entries(0).counters
        assert bank.evictions > 0 and bool((counters % 1 != 0).any())
