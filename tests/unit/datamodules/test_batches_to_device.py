"""Of a batch, the device gets what the network reads; facts of a window stay on the host, in every stage."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from datamodules import LocalText
from lightning_memlong.text import ON_DEVICE

META = torch.device("meta")


def local(folder: Path, backbone: Path, kind: type[LocalText] = LocalText) -> LocalText:
    return kind(path=str(folder), tokenizer=str(backbone), chunk_size=16, window=64, validation_fraction=0.2)


def test_facts_of_a_window_stay_on_the_host(text_folder: Path, tiny_backbone: Path) -> None:
    data = local(text_folder, tiny_backbone)
    data.setup("fit")
    batch = next(iter(data.train_dataloader())) | {"memory": None, "note": "as it is"}
    moved = data.transfer_batch_to_device(batch, META, 0)
    assert list(moved) == [*batch, "tokens"] and moved["tokens"] is batch["input_ids"], "for the encoder, on the host"
    devices = {name: value.device.type for name, value in moved.items() if isinstance(value, torch.Tensor)}
    assert devices == {name: "meta" if name in ON_DEVICE else "cpu" for name in devices} and len(devices) == 8
    assert moved["note"] == "as it is" and moved["memory"] is None
    assert all(batch[name].device.type == "cpu" for name in ON_DEVICE), "the batch itself is left as it is"


class Reads(L.LightningModule):
    """Notes on which device each part of a batch arrives, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, dict[str, str]] = {}

    def note(self, stage: str, batch: dict[str, Any]) -> torch.Tensor:
        self.seen[stage] = {name: value.device.type for name, value in batch.items()}
        return self.weight * 1.0

    def training_step(self, batch: dict[str, Any], number: int) -> torch.Tensor:
        return self.note("fit", batch)

    def validation_step(self, batch: dict[str, Any], number: int) -> None:
        self.note("validate", batch)

    def test_step(self, batch: dict[str, Any], number: int) -> None:
        self.note("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_asks_the_data_module_in_every_stage(text_folder: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    class OnMeta(LocalText):
        """A corpus that is told of a device which this machine need not have."""

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return super().transfer_batch_to_device(batch, META, dataloader_idx)

    data = OnMeta(
        path=str(text_folder), tokenizer=str(tiny_backbone), chunk_size=16, window=64, validation_fraction=0.2
    )
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", fast_dev_run=1, enable_model_summary=False, default_root_dir=tmp_path, **quiet
    )
    model = Reads()
    trainer.fit(model, datamodule=data)
    trained = model.seen.pop("fit")
    assert set(model.seen) == {"validate"}
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.test(model, datamodule=data, verbose=False)
    assert set(model.seen) == {"validate", "test"}
    for devices in (trained, *model.seen.values()):
        assert {name for name, device in devices.items() if device == "meta"} == set(ON_DEVICE)
        assert devices["document_start"] == devices["length"] == "cpu"
