"""What could be done instead of a memory, against transformers alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lightning_memlong.cli.main import main
from tests.integration.helpers import EVAL, found_in, rows_of, tiny

LENGTH, LOCAL, STRIDE, MADE_FOR = 512, 64, 32, 128


@pytest.fixture
def short_backbone(byte_backbone: Path, tmp_path: Path) -> Path:
    """A backbone that was made for few tokens."""
    folder = tmp_path / "short"
    shutil.copytree(byte_backbone, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": MADE_FOR}))
    return folder


@pytest.fixture
def options(short_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    small = tiny(short_backbone, text_folder, tmp_path / "runs")
    grid = ["--config", str(EVAL / "alternatives.yaml"), "--data.window", str(LOCAL), "--data.stride", str(STRIDE),
            "--data.split", "all", "--memory.query_chunks", "2", "--memory.top_k", "3",
            "--evaluation.lengths", f"[256, {LENGTH}]", "--evaluation.documents", "2"]  # fmt: skip
    return ["test", *small, *grid]


def cells(options: list[str], setting: str) -> dict[tuple[str, int, int], dict[str, Any]]:
    return {(r["document"], r["window"], r["length"]): r for r in rows_of(options) if r["setting"] == setting}


def ids_of(options: list[str], backbone: Path, document: str) -> Tensor:
    text = (Path(options[options.index("--data.path") + 1]) / document).read_text()
    return torch.tensor([AutoTokenizer.from_pretrained(backbone)(text, split_special_tokens=True)["input_ids"]])


def summed(log_p: Tensor, ids: Tensor, scored: int) -> float:
    return float(-log_p[0, :-1].gather(1, ids[0, 1:, None])[-scored:].sum())


@torch.no_grad()
def streaming(model: Any, ids: Tensor, sinks: int = 4) -> float:
    """StreamingLLM with what transformers has: newest tokens at their true places, sinks put right before them."""
    window, kept, scored = LOCAL, LOCAL - STRIDE, None
    steps = (ids.shape[1] - window) // STRIDE
    end = ids.shape[1] - steps * STRIDE
    cache = DynamicCache()
    logits = model(ids[:, :end], past_key_values=cache, position_ids=torch.arange(end)[None]).logits
    for start in range(end, ids.shape[1], STRIDE):
        before = DynamicCache()
        first = start - kept - sinks
        model(ids[:, :sinks], past_key_values=before, position_ids=torch.arange(first, first + sinks)[None])
        for number, layer in enumerate(cache.layers):
            before.update(layer.keys[:, :, -kept:], layer.values[:, :, -kept:], number)
        cache, last = before, logits[:, -1:]
        places = torch.arange(start, start + STRIDE)[None]
        block = ids[:, start : start + STRIDE]
        logits = model(block, past_key_values=cache, position_ids=places).logits
        scored = torch.cat([last, logits], dim=1).log_softmax(-1), block
    assert scored is not None
    log_p, block = scored
    return float(-log_p[0, :-1].gather(1, block[0, :, None]).sum())


def test_one_grid_of_all_of_them(options: list[str], short_backbone: Path) -> None:
    assert main(options) == 0
    each_is_what_transformers_alone_computes(options, short_backbone)
    what_each_costs_is_told(options)
    kinds_of_tokens_make_up_all_of_them(options)


def each_is_what_transformers_alone_computes(options: list[str], short_backbone: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(short_backbone)
    for kind, title in (("yarn", "YaRN, whole context"), ("dynamic", "dynamic NTK, whole context")):
        for (document, end, length), row in cells(options, title).items():
            config = AutoConfig.from_pretrained(short_backbone)
            factor = length / MADE_FOR if kind == "yarn" else 1.0
            config.rope_parameters = {**config.rope_parameters, "rope_type": kind, "factor": factor}
            if kind == "yarn":
                config.rope_parameters["original_max_position_embeddings"] = MADE_FOR
            stretched = AutoModelForCausalLM.from_pretrained(short_backbone, config=config)
            ids = ids_of(options, short_backbone, document)[:, end - length : end]
            with torch.no_grad():
                wanted = summed(stretched(ids).logits.log_softmax(-1), ids, STRIDE)
            assert row["nll"] == pytest.approx(wanted, rel=1e-4), title
    sinks = cells(options, "4 sinks and window")
    for (document, end, length), row in sinks.items():
        ids = ids_of(options, short_backbone, document)[:, end - length : end]
        assert row["nll"] == pytest.approx(streaming(model, ids), rel=1e-4)
    off = cells(options, "off")
    assert len(sinks) == 8 and all(row["nll"] != off[key]["nll"] for key, row in sinks.items())
    for (document, end, _), row in cells(options, "longer window").items():
        ids = ids_of(options, short_backbone, document)[:, end - 112 : end]
        with torch.no_grad():
            assert row["nll"] == pytest.approx(summed(model(ids).logits.log_softmax(-1), ids, STRIDE), rel=1e-4)
    for (document, end, _), row in cells(options, "trained window").items():
        ids = ids_of(options, short_backbone, document)[:, end - MADE_FOR : end]
        with torch.no_grad():
            assert row["nll"] == pytest.approx(summed(model(ids).logits.log_softmax(-1), ids, STRIDE), rel=1e-4)


def test_the_newest_chunks_in_the_prompt_are_a_longer_window(options: list[str]) -> None:
    assert main([*options, "--memory.newest", "1.0"]) == 0
    longer, prompt = cells(options, "longer window"), cells(options, "chunks in the prompt")
    assert longer and all(prompt[key]["nll"] == pytest.approx(row["nll"], rel=1e-5) for key, row in longer.items())


def test_other_chunks_are_other_prompts(options: list[str]) -> None:
    assert main([*options, "--evaluation.alternatives", "[prompt]", "--data.batch_size", "2"]) == 0
    longer, prompt = cells(options, "longer window"), cells(options, "chunks in the prompt")
    assert any(abs(prompt[key]["nll"] - row["nll"]) > 1e-3 for key, row in longer.items())


def what_each_costs_is_told(options: list[str]) -> None:
    config = AutoConfig.from_pretrained(options[options.index("--model.backbone") + 1])
    token = 2 * config.num_key_value_heads * config.head_dim * 4
    layers, stored = config.num_hidden_layers, config.num_hidden_layers - 1
    wanted = {
        "off": LOCAL * layers, "longer window": 112 * layers, "trained window": MADE_FOR * layers,
        "YaRN, whole context": LENGTH * layers, "4 sinks and window": (LOCAL + 4) * layers,
        "chunks in the prompt": 112 * layers, "retrieved": LOCAL * layers + (LENGTH - LOCAL) * stored,
    }  # fmt: skip
    for setting, held in wanted.items():
        found = [r for r in cells(options, setting).values() if r["length"] == LENGTH]
        assert found and {r["held"] for r in found} == {held * token}, setting
        assert all(r["seconds"] > 0 for r in found)
    told = found_in(options, "perplexity.md").read_text()
    assert "keys and values [MB]" in told and "lifted by a longer window" in told
    assert found_in(options, "perplexity-cost.png").stat().st_size > 10_000


def kinds_of_tokens_make_up_all_of_them(options: list[str]) -> None:
    told = [r for r in rows_of(options) if "kinds" in r]
    assert {r["length"] for r in told} == {LENGTH} and {r["setting"] for r in told} >= {"retrieved", "trained window"}
    for row in told:
        count, nll, off = np.array([*row["kinds"].values()]).sum(0)
        assert count == row["tokens"] == STRIDE
        assert nll == pytest.approx(row["nll"], rel=1e-6) and off == pytest.approx(row["nll_off"], rel=1e-6)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--evaluation.alternatives", "[rag]"], "evaluation.alternatives='rag'.*prompt"),
        (["--data.window", "128", "--data.stride", "128"], "evaluation.alternatives='prompt'.*room for a chunk"),
        (["--data.stride", "64"], "evaluation.alternatives='sinks'.*data.stride is less than"),
        (["--evaluation.settings", "{recent: {selection: recent}}"], "evaluation.alternatives='prompt'.*retrieves"),
        (["--memory.query", "current"], "evaluation.alternatives='prompt'.*retrieves, and does not leak"),
        (["--memory.selection", "random"], "evaluation.alternatives='prompt'.*retrieves, and does not leak"),
        (["--evaluation.settings", "{a: {distractors: 1}}"], "evaluation.settings.a=.'distractors'.*leave it out"),
        (["--evaluation.settings", "{YaRN\\, whole context: {}}"], "evaluation.settings=.*names of their own"),
    ],
)
def test_what_cannot_be_done_is_told(
    options: list[str], more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [text.replace("YaRN\\, whole context", '"YaRN, whole context"') for text in more]
    assert main([*options, *more]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_peer_is_left_out_where_it_was_not_made_for_the_length_and_that_is_said(
    options: list[str], short_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = ["--evaluation.peers", json.dumps({"other": str(short_backbone)}), "--evaluation.alternatives", "[]"]
    assert main([*options, *peer, "--evaluation.lengths", f"[{MADE_FOR}, 256]"]) == 0
    assert "evaluation.peers.other: made for 128 tokens; left out at 256." in capsys.readouterr().out
    assert {length for _, _, length in cells(options, "other")} == {MADE_FOR}


def test_positions_that_are_stretched_already_are_refused(
    options: list[str], short_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((short_backbone / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (short_backbone / "config.json").write_text(json.dumps(config))
    assert main(options) == 2
    assert "evaluation.alternatives='yarn'" in (told := capsys.readouterr().err) and "linear" in told
