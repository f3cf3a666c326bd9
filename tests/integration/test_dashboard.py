"""What a person sees in TensorBoard and in the run folder; watching changes nothing."""

import csv
import re
import time
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from matplotlib.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from callbacks.dashboard import LAYOUT
from callbacks.retrieval_statistics import RetrievalStatistics
from callbacks.validation_record import ValidationRecord
from lightning_memlong.bank import Retrieved
from lightning_memlong.cli.main import MemLongCLI, main
from lightning_memlong.memlong import MemLong
from lightning_memlong.training.profiler import StepProfiler
from tests.conftest import tiny_llama
from tests.integration.helpers import ROOT, differences, tiny

FIT = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3", "--validate_first", "false"]


def with_dashboard(every: int = 1, figures: str = "true") -> list[str]:
    return ["--trainer.callbacks", "callbacks.checkpoint.LastCheckpoint",
            "--trainer.callbacks+=callbacks.throughput.Throughput",
            "--trainer.callbacks+=callbacks.dashboard.Dashboard",
            f"--trainer.callbacks.every_n_steps={every}", f"--trainer.callbacks.figures={figures}"]  # fmt: skip


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def watched(tiny_backbone: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a bank that evicts."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["fit", *tiny(tiny_backbone, text_folder, runs), *FIT, *with_dashboard()]) == 0
    return runs / "memlong" / "version_0"


def test_every_chart_has_something_to_show(watched: Path) -> None:
    found = events(watched)
    scalars = found.Tags()["scalars"]
    assert "custom_scalars__config__" in found.Tags()["tensors"]
    elsewhere = {"retrieval/hit_rate", "gates/layer_.*", "cost/device_memory_gb"}  # other runs have them
    for charts in LAYOUT.values():
        for _, tags in charts.values():
            for tag in set(tags) - elsewhere:
                assert any(re.match(tag, name) for name in scalars), tag


def test_histograms_figures_and_texts(watched: Path) -> None:
    found = events(watched)
    assert set(found.Tags()["histograms"]) == {"memory/times_retrieved", "memory/age_in_insertions", "retrieval/scores",
                                               "memory/evicted_times_retrieved"}  # fmt: skip
    assert set(found.Tags()["images"]) == {
        "retrieval/map",
        "attention/memory_mass",
        "attention/memory_bias",
        "attention/memory_scale",
    }
    assert [image.step for image in found.Images("retrieval/map")] == [3, 6], "one a validation"
    text = found.Tensors("memory/window_that_gained_most/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "perplexity" in text and text.count("\n- **at ") == 3 and text.count("\n- ") == 3 + 12


def test_evictions_are_told_with_how_often_their_entries_were_retrieved(watched: Path) -> None:
    found = events(watched)
    evictions = max(e.value for e in found.Scalars("memory/evictions"))
    histograms = [h.histogram_value for h in found.Histograms("memory/evicted_times_retrieved")]
    assert sum(h.num for h in histograms) == evictions > 0
    mean = sum(h.sum for h in histograms) / evictions
    told = [e.value for e in found.Scalars("memory/evicted_retrievals")]
    assert min(told) <= mean <= max(told)


def test_the_hparams_tab_can_compare_runs(watched: Path) -> None:
    metadata = events(watched).SummaryMetadata("_hparams_/session_start_info")
    told = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert told["memory.top_k"].number_value == 3 and told["model.fusion"].string_value == "joint"
    assert told["model.optimizer.lr"].number_value == 0.01 and told["data.window"].number_value == 64


def test_metrics_are_a_csv_file_which_a_resumed_run_goes_on_with(
    watched: Path, tiny_backbone: Path, text_folder: Path
) -> None:
    def read() -> list[dict[str, str]]:
        with (watched / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    before = [row for row in read() if row["train/loss"]]
    assert [int(row["step"]) for row in before] == list(range(6))
    logged = {e.step: e.value for e in events(watched).Scalars("train/loss")}
    assert {int(row["step"]): float(row["train/loss"]) for row in before} == pytest.approx(logged)
    options = [*tiny(tiny_backbone, text_folder, watched.parents[1]), *FIT]
    assert main(["fit", *options, "--ckpt_path", "last", "--trainer.max_steps", "8"]) == 0
    after = [row for row in read() if row["train/loss"]]
    assert after[:6] == [row | {k: "" for k in after[0].keys() - row.keys()} for row in before] and len(after) == 8


def test_watching_changes_nothing(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> None:
    saved = []
    for name, more in (("on", with_dashboard()), ("off", ["--trainer.callbacks", "callbacks.checkpoint.LastCheckpoint",
                                                          "--trainer.profiler", "null"])):  # fmt: skip
        cli = MemLongCLI(["fit", *tiny(tiny_backbone, text_folder, tmp_path / name), *FIT, *more])
        saved.append(torch.load(cli.trainer.checkpoint_callback.last_model_path, weights_only=True))
    for part in ("state_dict", "optimizer_states"):
        assert not differences(saved[0][part], saved[1][part])
    banks = [next(v for k, v in s["callbacks"].items() if "MemoryBank" in k) for s in saved]
    assert not differences(*banks)


def test_gates_are_shown_by_layer_and_head(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> None:
    options = [*tiny(tiny_backbone, text_folder, tmp_path / "runs"), *FIT, "--model.fusion", "gated"]
    assert main(["fit", *options, *with_dashboard()]) == 0
    found = events(tmp_path / "runs" / "memlong" / "version_0").Tags()
    assert "attention/gates" in found["images"] and "gates/layer_1" in found["scalars"]


def test_planted_passages_are_looked_for(byte_backbone: Path, tmp_path: Path, text_folder: Path) -> None:
    options = tiny(byte_backbone, text_folder, tmp_path / "runs")
    at = options.index("--data.path")
    made = ["--config", str(ROOT / "conf" / "data" / "synthetic_recall.yaml")]
    few = {"data.kinds": "[pass_key]", "data.lengths": "[512]", "data.samples": 1, "data.path": "null",
           "memory.capacity": 512, "memory.top_k": 32}  # fmt: skip
    typed = [word for key, value in few.items() for word in (f"--{key}", str(value))]
    options = [*options[:2], *made, *options[2:at], *options[at + 2 :], *typed]
    assert main(["fit", *options, "--trainer.max_steps", "16", "--trainer.limit_val_batches", "0",
                 "--validate_first", "false", *with_dashboard(16)]) == 0  # fmt: skip
    rate = events(tmp_path / "runs" / "memlong" / "version_0").Scalars("retrieval/hit_rate")[-1].value
    assert rate == 1.0, "32 chunks are the whole bank"


def test_hits_and_overlaps() -> None:
    nothing = torch.zeros(1, 1, 32, 4)

    def batch(*places: int, document: int = 0, planted: tuple[int, int] = (-1, -1)) -> dict[str, object]:
        positions = torch.tensor([places])
        mask = torch.ones(1, 16 * len(places), dtype=torch.bool)
        memory = Retrieved(nothing, nothing, mask, torch.zeros(1, len(places)), positions, positions)
        return {"document_id": torch.tensor([document]), "memory": memory, "planted": torch.tensor([planted])}

    statistics = RetrievalStatistics()
    statistics.add(batch(0, 16, planted=(40, 50)))
    statistics.add(batch(16, 48, planted=(40, 50)))
    statistics.add(batch(-1, 16, document=1))
    assert statistics.overlaps == [0.5] and statistics.hits == [0.0, 1.0]


def test_rows_that_read_no_memory_are_in_no_share_of_attention() -> None:
    mask = torch.tensor([[True] * 16, [False] * 16])
    places, nothing = torch.tensor([[0], [-1]]), torch.zeros(2, 1, 16, 4)
    memory = Retrieved(nothing, nothing, mask, torch.zeros(2, 1), places, places)
    shares = torch.tensor([[0.5, 0.25], [0.0, 0.0]])
    assert torch.equal(memory.mean_over_readers(shares), shares[0]) and memory.mean_over_readers(shares[:, 0]) == 0.5
    record = ValidationRecord(lambda document: f"book {document}")
    facts = {"document_id": torch.tensor([3, -1]), "offset": torch.tensor([16, 0]), "length": torch.tensor([16, 0])}
    batch = facts | {"memory": memory, "input_ids": torch.zeros(2, 16, dtype=torch.long)}
    record.add(batch, {"memory_on": SimpleNamespace(attention_mass={5: shares})})
    assert torch.equal(record.mean_mass()[5], 100 * shares[0])
    figure = record.map()
    assert figure is not None and "document book 3" in "".join(t.get_text() for t in figure.findobj(Text))


def test_losses_token_by_token_are_cross_entropy() -> None:
    model = MemLong(tiny_llama(), memory_layer=1)
    ids = torch.randint(0, 97, (2, 24))
    labels = ids.masked_fill(torch.arange(24) < 5, -100)
    output = model(ids, labels)
    losses = output.token_losses(labels, block=7)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    assert torch.allclose(losses[:, 1:].flatten(), expected, atol=1e-5) and not losses[:, 0].any()
    assert float(losses.sum() / (labels[:, 1:] != -100).sum()) == pytest.approx(float(output.loss), rel=1e-5)


def test_an_output_that_is_kept_can_let_go_of_its_keys_and_values() -> None:
    ids = torch.randint(0, 97, (1, 24))
    output = MemLong(tiny_llama(), memory_layer=1)(ids, ids)
    kept = copy(output)
    kept.drop_kv()
    with pytest.raises(RuntimeError, match="drop_kv"):
        _ = kept.keys
    assert output.keys.shape[-2] == 24, "the one it is a copy of has them"
    assert torch.equal(kept.token_losses(ids), output.token_losses(ids))
    output.drop_kv()
    with pytest.raises(RuntimeError, match="drop_kv"):
        _ = output.values


def test_milliseconds_are_of_the_actions_they_are_named_after() -> None:
    profiler = StepProfiler()
    for _ in range(2):
        with profiler.profile("[Strategy]SingleDeviceStrategy.training_step"):
            time.sleep(0.01)
        with profiler.profile("[Callback]Other.training_step"), profiler.profile("memory.search"):
            pass
    spent = profiler.take(steps=2)
    assert spent.keys() == {"forward", "search"} and 10 <= spent["forward"] < 100 and spent["search"] < 5
    assert profiler.take(1) == {}
