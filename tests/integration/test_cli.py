"""The command line: overrides reach what is derived, every shipped file runs, every mistake is told."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from callbacks.memory_bank import MemoryBankCallback
from lightning_memlong.cli.main import MemLongCLI, main
from lightning_memlong.model import CHECKPOINT_FORMAT
from tests.conftest import tiny_llama
from tests.integration.helpers import ROOT, tiny


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    return tiny(tiny_backbone, text_folder, tmp_path / "runs")


def build(*args: str) -> MemLongCLI:
    return MemLongCLI(list(args), run=False)


def bank_callback(cli: MemLongCLI) -> MemoryBankCallback:
    return next(c for c in cli.trainer.callbacks if isinstance(c, MemoryBankCallback))


# ---- overrides --------------------------------------------------------------------------------------------


def test_an_override_reaches_everything_derived_from_it(options: list[str], tmp_path: Path) -> None:
    cli = build(*options, "--memory.chunk_size", "32", "--data.window", "128", "--memory.capacity", "512",
                "--trainer.max_steps", "15", "--seed_everything", "5")  # fmt: skip
    data, callback = cli.datamodule, bank_callback(cli)
    assert (data.window, data.stride, data.chunk_size) == (128, 128, 32)
    assert callback.retrieval(cli.model).new_bank(1).slots == 512 // 32
    assert data.seed == 5
    schedule = cli.model.configure_optimizers()["lr_scheduler"]["scheduler"]
    for _ in range(15):
        schedule.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0.0, 0.0, 0.0], "the schedule ends where training ends"
    assert data.settings.tokenizer == cli.model.backbone_name


def test_a_second_file_reaches_everything_too(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  max_steps: 9\nmemory:\n  chunk_size: 64\n  capacity: 256\n  top_k: 3\n"
    )
    cli = build(*options[:2], "--config", str(tmp_path / "more.yaml"),
                *[o for o in options[2:]][:2], "--model.memory_layer", "1", "--trainer.logger", "false")  # fmt: skip
    assert cli.config.model.scheduler.init_args.total_steps == 9
    assert cli.datamodule.chunk_size == 64 and bank_callback(cli).retrieval(cli.model).new_bank(1).slots == 4


def test_naming_the_data_class_keeps_everything_else(options: list[str], text_folder: Path) -> None:
    cli = build(*options, "--data", "datamodules.LocalText", "--data.path", str(text_folder), "--seed_everything", "3")
    assert (cli.datamodule.window, cli.datamodule.seed, cli.datamodule.path) == (64, 3, str(text_folder))


def test_memory_is_addressable_whatever_the_callback_list(options: list[str]) -> None:
    cli = build(*options, "--trainer.callbacks", "callbacks.throughput.Throughput", "--memory.top_k", "2")
    assert bank_callback(cli).config.top_k == 2
    off = build(*options, "--memory.enabled", "false")
    assert not any(isinstance(c, MemoryBankCallback) for c in off.trainer.callbacks)


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test"])
def test_help_names_every_option(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for option in ("--model.memory_layer", "--memory.capacity", "--memory.policy", "--memory.retriever.name",
                   "--data.help", "--data.window", "--data.path", "--trainer.max_steps", "--ckpt_path"):  # fmt: skip
        assert option in text, option
    assert "[tokens]" in text and "default: 16384" in text


# ---- shipped files ----------------------------------------------------------------------------------------

MORE = {
    "single": ["--model.retrieval_layers", "[1,3]"],
    "single_gated": ["--model.retrieval_layers", "[1,3]"],
    "sliding": ["--data.stride", "32"],
}


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "ablations").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_ablation_runs(file: Path, options: list[str]) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 8, "an ablation holds only what differs"
    cut = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "3", "--validate_first", "false"]
    args = [*options[:2], "--config", str(file), *options[2:], *MORE.get(file.stem, []), *cut]
    assert main(["fit", *args]) == 0


def test_the_papers_setting_runs_on_a_tiny_model_of_its_family(
    tiny_backbone: Path, text_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "open_llama"
    tiny_llama(num_hidden_layers=26, num_key_value_heads=4, max_position_embeddings=2048).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(folder)
    cli = MemLongCLI(
        ["fit", "--config", str(ROOT / "conf" / "paper.yaml"), "--model.backbone", str(folder),
         "--memory.retriever.name", "hashing", "--data.path", str(text_folder), "--data.min_document_tokens", "600",
         "--data.validation_fraction", "0.2", "--trainer.accelerator", "cpu", "--trainer.max_steps", "2",
         "--trainer.limit_val_batches", "2", "--trainer.logger.save_dir", str(tmp_path / "runs")]
    )  # fmt: skip
    model, memory = cli.model.model, bank_callback(cli).config
    assert (model.memory_layer, model.retrieval_layers) == (13, [13, 17, 21, 25])
    assert (model.layout.source, model.layout.fusion, model.layout.position) == ("single", "gated", "zero")
    assert (memory.chunk_size, memory.top_k, memory.capacity) == (128, 8, 32768)
    assert model.backbone.is_gradient_checkpointing and cli.trainer.precision == "bf16-mixed"
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in model.trainable() if ".layers." in name}
    assert layers == set(range(14, 26)) and cli.trainer.global_step == 2


# ---- checkpoints ------------------------------------------------------------------------------------------


def test_what_is_typed_wins_over_the_checkpoint_and_both_are_told(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lora = ["--model.tuning.mode", "lora", "--model.tuning.lora_rank", "2"]
    main(["fit", *options, "--model.position", "zero", *lora, "--validate_first", "false"])
    capfd.readouterr()
    kept = MemLongCLI(["validate", *options, "--ckpt_path", "last"])
    assert kept.model.model.tuning.config.lora_rank == 2
    assert kept.model.model.layout.position == "zero", "the first --config does not undo how a checkpoint was trained"
    (tmp_path / "other.yaml").write_text("model:\n  position: sequential\n")
    for typed in (["--model.position", "sequential"], ["--config", str(tmp_path / "other.yaml")]):
        assert main(["validate", *options, *typed, "--ckpt_path", "last"]) == 0
        told = " ".join("".join(capfd.readouterr()).split())
        assert "model.position: checkpoint 'zero'" in told and "'sequential'" in told and "what you typed" in told
    records = sorted((tmp_path / "runs").rglob("run_validate.json"))
    assert '"checkpoint": "zero"' in records[-1].read_text()


# ---- mistakes ---------------------------------------------------------------------------------------------


def told(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Run, expect status 2 and one message without a traceback, and give the message."""
    try:
        status = main(args)
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    message = capfd.readouterr().err
    assert status == 2 and "error: " in message and "Traceback" not in message, message
    return message


MISTAKES = {
    "unknown key": (["--memory.topk", "4"], ["memory.topk", "memory.top_k", "Fix:"]),
    "unknown policy": (["--memory.policy", "lru3"], ["memory.policy='lru3'", "retrieval_frequency, fifo"]),
    "layer order": (["--model.retrieval_layers", "[0,2]"], ["model.retrieval_layers=[0, 2]", "model.memory_layer=1"]),
    "layer range": (["--model.memory_layer", "40"], ["model.memory_layer=40", "0..3"]),
    "layer fraction": (["--model.memory_layer", "1.5"], ["model.memory_layer=1.5", "fraction", "0..3"]),
    "flex without a GPU": (["--model.attention", "flex"], ["model.attention='flex'", "auto or sdpa"]),
    "unknown kernels": (["--model.attention", "fast"], ["model.attention='fast'", "auto, sdpa, flex"]),
    "unknown granularity": (["--memory.granularity", "token"], ["memory.granularity", "window"]),
    "no first token": (["--model.prepend_bos", "true"], ["model.prepend_bos=True", "has none"]),
    "adapters on nothing": (
        ["--model.tuning.mode", "lora", "--model.tuning.lora_targets", "[q_proj, qkv_proj]"],
        ["model.tuning.lora_targets", "qkv_proj matches no linear layer", "Allowed: down_proj"],
    ),
    "top_k too large": (["--memory.top_k", "9"], ["memory.top_k=9", "144 tokens", "memory.capacity=128"]),
    "chunk and window": (["--memory.chunk_size", "48", "--memory.capacity", "480"], ["data.window=64"]),
    "no such path": (["--data.path", "/nowhere/at/all"], ["data.path='/nowhere/at/all'", "does not exist"]),
    "no such backbone": (["--model.backbone", "/nowhere/model"], ["model.backbone='/nowhere/model'"]),
    "no such retriever": (["--memory.retriever.name", "/nowhere/enc"], ["memory.retriever.name='/nowhere/enc'"]),
    "wrong type": (["--memory.top_k", "many"], ["memory.top_k", "int"]),
    "no checkpoint": (["--ckpt_path", "last"], ["ckpt_path='last'", "no run under"]),
    "no such checkpoint": (["--ckpt_path", "/nowhere.ckpt"], ["ckpt_path='/nowhere.ckpt'", "not a file"]),
    "bank smaller than a window": (["--memory.capacity", "48"], ["memory.capacity=48", "data.window=64"]),
    "no eviction and no room": (
        ["--memory.policy", "none", "--memory.top_k", "1"],
        ["memory.capacity=128", "longest document", "data.max_document_tokens"],
    ),
    "keys of other layers left out": (["--memory.save_keys_values", "false"], ["memory.save_keys_values", "single"]),
    "chosen by no kernel": (
        ["--memory.candidates", "8", "--model.attention", "sdpa"],
        ["memory.candidates=8", "null with model.attention=sdpa", "--model.attention auto"],
    ),
    "no other rows": (["--memory.distractors", "1"], ["memory.distractors=1", "data.batch_size=1", "raise"]),
    "weights without memory": (
        ["--model.loss_weights", "long_context", "--memory.enabled", "false"],
        ["model.loss_weights='long_context'", "memory.enabled"],
    ),
    "half-life": (["--memory.half_life", "0"], ["memory.half_life=0", "above 0"]),
    "not a policy": (["--memory.policy", "math.pi"], ["memory.policy='math.pi'", "import path"]),
    "maximum below minimum": (["--data.max_document_tokens", "32"], ["data.max_document_tokens=32", "64"]),
    "no space": (["--trainer.logger.save_dir", "/proc/nowhere"], ["cannot write", "--trainer.logger.save_dir"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str, options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args, words = MISTAKES[name]
    message = told(["fit", *options, *args], capfd)
    assert all(word in message for word in words), message
    assert not (tmp_path / "runs").exists(), "nothing half-written"


def test_bad_text_is_told(options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no text" in told(["fit", *options, "--data.path", str(empty)], capfd)
    (empty / "picture.txt").write_bytes(bytes(range(256)))
    message = told(["fit", *options, "--data.path", str(empty)], capfd)
    assert "picture.txt" in message and "UTF-8" in message


def test_unknown_key_in_a_file_is_told(options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "typo.yaml").write_text("memory:\n  capasity: 256\n")
    message = told(["fit", *options, "--config", str(tmp_path / "typo.yaml")], capfd)
    assert "capasity" in message and "memory.capacity" in message


def test_a_backbone_that_drops_the_memory_is_told(
    options: list[str], tiny_backbone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stablelm"
    config = AutoConfig.for_model("stablelm", vocab_size=97, hidden_size=32, intermediate_size=48,
                                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(folder)
    message = told(["fit", *options, "--model.backbone", str(folder)], capfd)
    assert "StableLm" in message and "Llama, Mistral" in message


def test_a_checkpoint_of_another_backbone_is_told(
    options: list[str], tiny_backbone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *options, "--validate_first", "false"])
    other = tmp_path / "other"
    tiny_llama(seed=9, initializer_range=0.1).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(other)
    capfd.readouterr()
    message = told(["validate", *options, "--ckpt_path", "last", "--model.backbone", str(other)], capfd)
    assert "another backbone" in message and "embedding_sum" in message
    checkpoint = next((tmp_path / "runs").rglob("last.ckpt"))
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    assert "cut short" in told(["validate", *options, "--ckpt_path", str(cut)], capfd)
    old = torch.load(checkpoint, weights_only=True)
    old["memlong"]["format"] = 1
    torch.save(old, cut)
    said = told(["validate", *options, "--ckpt_path", str(cut)], capfd)
    assert f"is of format 1. Allowed: {CHECKPOINT_FORMAT}" in said
    torch.save({"state_dict": {}}, cut)
    assert "not a MemLong checkpoint" in told(["validate", *options, "--ckpt_path", str(cut)], capfd)


def test_a_resume_on_other_text_or_with_another_retriever_is_told(
    options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *options, "--validate_first", "false"])
    resume = ["fit", *options, "--ckpt_path", "last", "--trainer.max_steps", "6"]
    assert "training text is not the one" in told([*resume, "--data.min_document_tokens", "400"], capfd)
    message = told([*resume, "--memory.retriever.name", "all-MiniLM-L6-v2"], capfd)
    assert "memory.retriever='all-MiniLM-L6-v2'" in message and "'hashing'" in message
    message = told([*resume, "--memory.retriever.prompt", "query: "], capfd)
    assert "memory.retriever='hashing query:'" in message, "what the bank holds was embedded without"
    assert "data.window=128" in told([*resume, "--data.window", "128"], capfd)


@pytest.mark.slow
def test_no_space_for_a_checkpoint_is_told_and_leaves_nothing_half_written(options: list[str], tmp_path: Path) -> None:
    main(["validate", *options])  # the token cache is made before space runs out
    limit = 60_000
    done = subprocess.run(
        [sys.executable, "train.py", "fit", *options, "--trainer.max_steps", "20", "--validate_first", "false"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2 and "Allowed: a writable folder with free space" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").rglob("*.ckpt*"))
