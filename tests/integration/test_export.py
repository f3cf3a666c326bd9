"""Export to a plain folder and back, through train.py; and the sweep over layers."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_memlong import MemLong, MemoryBank
from lightning_memlong.cli.main import MemLongCLI, main
from tests.integration.helpers import tiny
from tests.integration.test_cli import told

LORA = ["--model.tuning.mode", "lora", "--model.tuning.lora_rank", "2", "--model.tuning.lora_alpha", "16"]


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    return tiny(tiny_backbone, text_folder, tmp_path / "runs")


def ids() -> torch.Tensor:
    return torch.randint(2, 50, (1, 64), generator=torch.Generator().manual_seed(0))


def with_memory(model: MemLong) -> torch.Tensor:
    """Logits of a window that reads another one."""
    bank = MemoryBank(1, 256, 16)
    embeddings = torch.nn.functional.normalize(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    with torch.no_grad():
        first = model(ids().flip(1))
        bank.insert(first.keys, first.values, embeddings, torch.full((1, 4), 16), torch.arange(0, 64, 16)[None])
        return model(ids(), memory=bank.gather(bank.recent(3))).logits


@pytest.mark.parametrize(
    "how",
    [
        ["--model.tuning.head", "true", "--model.source", "single", "--model.fusion", "gated"],
        [*LORA, "--model.fusion", "gated", "--model.position", "zero", "--model.memory_layer", "0.25",
         "--model.retrieval_layers", "[1, 0.75]"],
    ],
    ids=["head and gates", "adapters, gates and fractions"],
)  # fmt: skip
def test_a_tuned_model_is_exported_and_reloaded(
    how: list[str], options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit = MemLongCLI(["fit", *options, *how, "--validate_first", "false"])
    tuned = fit.model.model.eval()
    folder = tmp_path / "exported"
    capfd.readouterr()
    assert main(["export", *options, "--ckpt_path", "last", "--output", str(folder)]) == 0
    assert f"Exported: {folder}" in capfd.readouterr().out

    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(plain(ids()).logits, tuned(ids()).logits, atol=1e-5, rtol=1e-5)
    again = MemLong.from_pretrained(folder).eval()
    assert again.settings() == tuned.settings()
    torch.testing.assert_close(with_memory(again), with_memory(tuned), atol=1e-5, rtol=1e-5)
    assert (with_memory(again) - again(ids()).logits).abs().max() > 1e-6
    assert set(again.gates) == set(tuned.gates)
    assert all(torch.equal(again.gates[k], tuned.gates[k]) for k in tuned.gates)

    backbone = ["--model.backbone", str(folder), "--validate_first", "false"]
    evaluated = MemLongCLI(["validate", *options, *backbone[:2]])
    assert evaluated.model.model.settings() == tuned.settings(), "settings come with the folder"
    trained = float(fit.trainer.callback_metrics["val/perplexity"])
    assert float(evaluated.trainer.callback_metrics["val/perplexity"]) == pytest.approx(trained, rel=1e-5)
    configured = ["--config", str(folder / "memlong.yaml"), *backbone, "--trainer.max_steps", "1"]
    configured += ["--trainer.limit_val_batches", "0"]
    assert main(["fit", *options, *configured]) == 0, "a configuration file of train.py, and it can be tuned further"


def test_it_loads_without_this_project(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert main(["export", *options, "--output", str(folder)]) == 0
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r}); AutoTokenizer.from_pretrained({str(folder)!r}); "
        "print(m.config._attn_implementation, [n for n in sys.modules if n.startswith('lightning_memlong')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "sdpa []", done.stderr
    assert "memlong" not in json.dumps(json.loads((folder / "config.json").read_text()))


def test_mistakes_with_exported_folders_are_told(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gated = ["--model.fusion", "gated", "--model.retrieval_layers", "[1, 2]"]
    folder = tmp_path / "exported"
    assert main(["export", *options, *gated, "--output", str(folder)]) == 0
    message = told(["export", *options, *gated, "--output", str(folder)], capfd)
    assert f"output={str(folder)!r}" in message and "does not exist yet" in message
    assert "output: cannot write" in told(["export", *options, "--output", "/proc/nowhere/at/all"], capfd)
    use = ["validate", *options, "--model.backbone", str(folder)]
    message = told([*use, "--model.retrieval_layers", "[1, 3]"], capfd)
    assert "model.retrieval_layers=[1, 3]" in message and "[1, 2]" in message and "joint" in message
    gates = load_file(folder / "memlong_gates.safetensors")
    save_file({k: torch.zeros(7) for k in gates}, folder / "memlong_gates.safetensors")
    assert "model.retrieval_layers=[1, 2]" in told(use, capfd)
    (folder / "memlong_gates.safetensors").write_bytes(b"cut")
    assert "memlong_gates.safetensors is damaged" in told(use, capfd)
    (folder / "memlong.yaml").write_text("model: [")
    message = told(use, capfd)
    assert "memlong.yaml in it cannot be read" in message and "plain backbone" in message
    plain = MemLong.from_pretrained(options[options.index("--model.backbone") + 1])
    assert plain.memory_layer == 1, "three eighths of four layers, where nothing is stored with the weights"


def test_layers_are_swept(options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cut = ["--memory_layers", "[1, 0.5]", "--trainer.limit_val_batches", "4", "--data.batch_size", "2"]
    assert main(["layers", *options, *cut]) == 0
    out = capfd.readouterr().out
    run = tmp_path / "runs" / "memlong" / "version_0"
    assert f"{run}/layers.csv" in out.replace("\n", "") and "6/6" in out and "on / off" in out
    rows = list(csv.DictReader((run / "layers.csv").read_text().splitlines()))
    assert len(rows) == 12 and {row["readers"] for row in rows} == {"above", "spread", "own"}
    alone = MemLongCLI(
        ["validate", *options, *cut[2:], "--model.retrieval_layers", "[1,2,3]", "--model.memory_layer", "1"]
    )
    metrics = alone.trainer.callback_metrics
    row = next(r for r in rows if (r["memory_layer"], r["readers"], r["source"]) == ("1", "above", "per_layer"))
    assert float(row["perplexity"]) == pytest.approx(float(metrics["val/perplexity"]), abs=1e-3)
    assert float(row["perplexity_memory_off"]) == pytest.approx(float(metrics["val/perplexity_memory_off"]), abs=1e-3)
    assert "| 1 |" in (run / "layers.md").read_text()
    assert Image.open(run / "layers.png").size[0] > 500
    assert (run / "config_layers.yaml").exists() and list(run.glob("events*"))
    message = told(["layers", *options, *cut, "--model.fusion", "gated"], capfd)
    assert "model.fusion='gated'" in message and "untrained gates are closed" in message
    assert "readers='all'" in told(["layers", *options, *cut, "--readers", "[all]"], capfd)
    assert "memory.enabled=False" in told(["layers", *options, *cut, "--memory.enabled", "false"], capfd)


def test_trained_parameters_are_shown_before_the_run_starts(
    options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *options, *LORA, "--validate_first", "false", "--trainer.max_steps", "1"])
    out = capfd.readouterr().out
    assert out.index("Trained: ") < out.index("after training")
    assert "layers.2-3.self_attn.q_proj.lora_A" in out and "Memory layer 1" in out
