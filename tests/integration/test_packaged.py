"""The default run on the packaged 135M model and encoder, cut short: what `make fit` does, for real."""

from pathlib import Path

import pytest
import torch

from lightning_memlong import Retrieved
from lightning_memlong.cli.main import MemLongCLI
from tests.integration.helpers import CONFIG, ROOT

pytestmark = pytest.mark.slow
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "6", "--trainer.val_check_interval", "2"]


@pytest.fixture(autouse=True)
def shared_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converted backbone (half a gigabyte) is made once, where a user's is."""
    monkeypatch.delenv("MEMLONG_CACHE")


def test_default_run(tmp_path: Path) -> None:
    cli = MemLongCLI(
        ["fit", "--config", str(ROOT / CONFIG), "--trainer.logger.save_dir", str(tmp_path),
         "--validate_first", "false", *SHORT]
    )  # fmt: skip
    metrics = cli.trainer.callback_metrics
    assert float(metrics["val/perplexity_ratio"]) < 0.95, "memory helps without training, on real text"
    assert 2 < float(metrics["val/perplexity"]) < 40
    bank = next(c for c in cli.trainer.callbacks if type(c).__name__ == "MemoryBankCallback").banks["train"]
    assert bank.stats()["insertions"] == 8 and cli.trainer.checkpoint_callback.last_model_path


@pytest.mark.long
def test_single_gated_is_the_backbone_at_step_0_on_the_real_model(tmp_path: Path) -> None:
    gated = str(ROOT / "conf" / "ablations" / "single_gated.yaml")
    cli = MemLongCLI(
        ["validate", "--config", str(ROOT / CONFIG), "--config", gated, "--trainer.logger", "false",
         "--trainer.limit_val_batches", "3"]
    )  # fmt: skip
    metrics = cli.trainer.callback_metrics
    assert abs(float(metrics["val/perplexity_ratio"]) - 1) < 1e-5
    model = cli.model.model
    ids = torch.randint(0, 49152, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(ids)
        nothing = torch.zeros(1, 1)
        mask = torch.ones(1, 256, dtype=torch.bool)
        read = model(ids.flip(1), memory=Retrieved(first.keys, first.values, mask, nothing, nothing, nothing)).logits
        plain = model.unwrap()(ids.flip(1)).logits
    torch.testing.assert_close(read, plain, atol=1e-4, rtol=1e-5)
