"""The adapter for lm-eval, on a task of local files, against lm-eval's own model of the same backbone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lightning_memlong import UserError
from lightning_memlong.retrieval import retrieve_for
from tests.hub import FakeHub
from tests.integration.helpers import ROOT

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lightning_memlong.generation import LocalContext  # noqa: E402
from lightning_memlong.lm_eval import MemLongLM  # noqa: E402
from lightning_memlong.lm_eval.adapter import tokenizer_named  # noqa: E402
from lightning_memlong.model.checkpoint import CHECKPOINT_FORMAT  # noqa: E402

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
WRITING = """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def backbone(byte_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose texts have an end, as lm-eval's own model needs it."""
    folder = tmp_path_factory.mktemp("ending")
    shutil.copytree(byte_backbone, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(byte_backbone)
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"question": f"film {i} was", "choices": [" kan", " lor mis"], "answer": i % 2} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in (("choosing", CHOICE), ("writing", WRITING)):
        text = TASK.format(name=f"local_{name}", data=tmp_path / "data.jsonl") + rest
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, n) for n, a in enumerate(arguments)]  # type: ignore[arg-type]


def ours(backbone: Path, **options: Any) -> MemLongLM:
    memory = {"chunk_size": 16, "top_k": 2, "retriever": "hashing", "memory_layer": 1, "window": 128}
    return MemLongLM(str(backbone), **(memory | options))


def test_short_requests_score_as_the_backbone_does(backbone: Path) -> None:
    theirs = HFLM(pretrained=str(backbone), device="cpu", dtype="float32", batch_size=1)
    mine = ours(backbone)
    pairs = requests("loglikelihood", ("kan lor", " mis"), ("x " * 40, "tur rax"), ("", "kan"))
    for (a, greedy), (b, also) in zip(mine.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert a == pytest.approx(b, rel=1e-4) and greedy == also
    rolling = requests("loglikelihood_rolling", ("kan lor mis",), ("tur " * 25,))
    for a, b in zip(mine.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling), strict=True):
        assert a == pytest.approx(b if isinstance(b, float) else b[0], rel=1e-4)


def test_what_does_not_fit_the_window_is_read_into_memory(backbone: Path) -> None:
    mine = ours(backbone)
    context = ("kan lor mis tur " * 30).strip()
    pairs = requests("loglikelihood", (context, " rax"), (context, " sin"), (context + "x", " sin"))
    scores = [score for score, _ in mine.loglikelihood(pairs)]
    assert mine.last_read is not None
    beginning = mine.last_read[0]
    assert len(beginning) % 16 == 0 and len(beginning) >= len(context) - 128
    ids = torch.tensor([mine.tok_encode(context)])
    bank = mine.model.read_tokens([ids[0, : len(beginning)].numpy()], window=128, progress=False)
    local = ids[0, len(beginning) :].tolist()
    asked = mine.model.retrieval.retriever.encode([mine.question_in(local)])
    scored = mine.tok_encode(" rax")
    memory = retrieve_for(mine.model.retrieval, bank, [asked])
    with torch.no_grad():
        logits = mine.model(torch.tensor([[*local, *scored]]), memory=memory).logits[0, len(local) - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(scored), reduction="sum")
    assert scores[0] == pytest.approx(-float(wanted), rel=1e-4)
    text = "kan lor mis tur " * 40
    context = LocalContext(mine.model.long_context, mine.model.retrieval.new_bank(1, 0), 0, 128)
    ids, total = [mine.prefix_token_id], 0.0
    for token in mine.tok_encode(text):
        total += float(context.logits(torch.tensor([ids]))[0, 0].log_softmax(-1)[token])
        ids.append(token)
    assert context.moved > 0
    found = mine.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert found[0] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("bos", [None, 7])
def test_contexts_side_by_side_score_as_one_after_the_other(backbone: Path, bos: int | None) -> None:
    long = ("kan lor mis tur " * 30).strip()
    texts = [("kan lor", " mis"), (long, " rax"), ("", "kan"), ("x " * 40, "tur rax"), ("y" * 127, "z"), (long, " sin")]
    pairs = requests("loglikelihood", *texts)
    alone, *others = (ours(backbone, bos=bos, batch_size=n).loglikelihood(pairs) for n in (1, 2, "auto"))
    for scores in others:
        assert [s for s, _ in scores] == pytest.approx([s for s, _ in alone], rel=1e-4)
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in alone]


def test_a_stop_text_counts_in_the_answer_alone(backbone: Path) -> None:
    """One that begins in the question, and ends in the answer, is none."""
    mine = ours(backbone)
    theirs = HFLM(pretrained=str(backbone), device="cpu", dtype="float32", batch_size=1)
    (free,) = mine.generate_until(requests("generate_until", ("kan lor", {"until": [], "max_gen_toks": 12})))
    stops = ["r" + free[0], free[2:4]]
    asked = requests("generate_until", ("kan lor", {"until": stops, "max_gen_toks": 12}))
    (answer,) = mine.generate_until(asked)
    assert answer == theirs.generate_until(asked)[0] == free[: free.index(free[2:4])] and answer


def test_a_chat_template_that_is_not_there_is_told(backbone: Path) -> None:
    with pytest.raises(UserError, match="apply_chat_template.*a backbone with a chat template"):
        ours(backbone).apply_chat_template([{"role": "user", "content": "kan"}])


def test_it_writes_the_likeliest_whatever_the_backbone_says(backbone: Path) -> None:
    mine = ours(backbone)
    asked = requests("generate_until", ("kan lor", {"until": ["\n\n"], "max_gen_toks": 12}))
    greedy = mine.generate_until(asked)
    mine.model.backbone.generation_config.do_sample = True
    assert mine.generate_until(asked) == mine.generate_until(asked) == greedy
    sampled = requests("generate_until", ("kan lor", {"do_sample": True, "temperature": 5.0, "max_gen_toks": 12}))
    assert mine.generate_until(sampled) != greedy


def test_a_first_token_is_there_once(backbone: Path) -> None:
    mine = ours(backbone, bos=7)
    plain = mine.model.backbone
    ids = mine.tok_encode("kan lor")
    mine.model.unwrap()
    with torch.no_grad():
        logits = plain(torch.tensor([[7, *ids]])).logits[0, :-1]
    wanted = -float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
    again = ours(backbone, bos=7)
    assert again.loglikelihood_rolling(requests("loglikelihood_rolling", ("kan lor",)))[0] == pytest.approx(
        wanted, rel=1e-4
    )
    assert again.loglikelihood(requests("loglikelihood", ("", "kan lor")))[0][0] == pytest.approx(wanted, rel=1e-4)


def test_a_local_task_through_the_command_line(backbone: Path, tasks: Path) -> None:
    arguments = f"pretrained={backbone},window=128,chunk_size=16,retriever=hashing,memory_layer=1"
    command = [sys.executable, "-m", "lightning_memlong.lm_eval", "--model", "memlong", "--model_args", arguments]
    command += ["--tasks", "local_choosing,local_writing", "--include_path", str(tasks), "--output_path", str(tasks)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "hub")}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_choosing" in done.stdout and "local_writing" in done.stdout
    found = json.loads(next(tasks.rglob("results_*.json")).read_text())["results"]
    manager = TaskManager(include_path=str(tasks))
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(backbone), device="cpu", dtype="float32", batch_size=1),
        tasks=["local_choosing", "local_writing"], task_manager=manager, bootstrap_iters=0,
    )["results"]  # fmt: skip
    for task, metric in (("local_choosing", "acc,none"), ("local_writing", "exact_match,none")):
        assert found[task][metric] == theirs[task][metric]


def test_around_a_model_that_is_there(backbone: Path) -> None:
    mine = ours(backbone)
    again = MemLongLM.around(mine.model, window=128, batch_size=2)
    pairs = requests("loglikelihood", ("kan lor", " mis"), (("kan lor mis tur " * 30).strip(), " rax"))
    for a, b in zip(again.loglikelihood(pairs), mine.loglikelihood(pairs), strict=True):
        assert a == (pytest.approx(b[0], rel=1e-4), b[1])
    assert (again.window, again.max_gen_toks, again.batch_size) == (128, 256, 2)


def test_another_tokenizer_of_the_same_tokens(backbone: Path, byte_backbone: Path, tmp_path: Path) -> None:
    mine = ours(backbone, tokenizer=str(byte_backbone))
    assert mine.tokenizer is mine.model.retrieval.tokenizer and mine.tokenizer.eos_token_id is None
    assert ours(backbone, tokenizer=mine.tokenizer).tokenizer is mine.tokenizer
    larger = AutoTokenizer.from_pretrained(byte_backbone)
    larger.add_tokens(["kan lor"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer='.*, 258 tokens' cannot be used. Allowed: one of at most the 257"):
        ours(backbone, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="'/nowhere' cannot be loaded"):
        ours(backbone, tokenizer="/nowhere")


def test_tasks_that_make_documents_find_tokenizers_by_our_names(backbone: Path, tmp_path: Path) -> None:
    """A run folder of ours is no name that transformers knows."""
    (tmp_path / "checkpoints").mkdir()
    stored = {"hyper_parameters": {"backbone": str(backbone)}, "memlong": {"format": CHECKPOINT_FORMAT}}
    torch.save(stored, tmp_path / "checkpoints" / "last.ckpt")
    assert tokenizer_named(str(tmp_path)).name_or_path == tokenizer_named(str(backbone)).name_or_path == str(backbone)
    with pytest.raises(UserError, match="tokenizer=''.*pretrained="):
        tokenizer_named("")


@pytest.fixture
def chatting(backbone: Path, tmp_path: Path) -> Path:
    """The backbone with a chat template, which marks the beginning of each message."""
    folder = tmp_path / "chatting"
    shutil.copytree(backbone, folder)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{m.role}}>{{m.content}}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def command_line(model_args: str, *more: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lightning_memlong.lm_eval", "--model", "memlong", "--model_args", model_args]
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([*command, *more], cwd=ROOT, env=env, capture_output=True, text=True)


def results(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Scores by task, and what each was asked."""
    found = json.loads(next(folder.rglob("results_*.json")).read_text())["results"]
    samples = {
        name: [json.loads(line) for file in folder.rglob(f"samples_{name}_*.jsonl") for line in file.open()]
        for name in found
    }
    return found, samples


@pytest.mark.long
@pytest.mark.slow
def test_rulers_tasks_start_with_the_packaged_backbone(tmp_path: Path) -> None:
    pytest.importorskip("wonderwords")
    more = ["--tasks", "ruler_fwe", "--limit", "1", "--output_path", str(tmp_path), "--log_samples"]
    done = command_line("pretrained=smollm2-135m,top_k=2", *more)
    assert done.returncode == 0, done.stderr[-2000:]
    found, samples = results(tmp_path)
    assert 0 <= found["ruler_fwe"]["4096,none"] <= 1
    assert 3500 < samples["ruler_fwe"][0]["doc"]["length"] < 4200
    done = command_line("top_k=2", *more)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: pretrained=None")


@pytest.mark.long
def test_babilong_and_longbench_as_they_are(chatting: Path, tmp_path: Path) -> None:
    """lm-eval's own tasks and templates, on files of their format that a hub on this machine serves."""
    long = "Mary went to the kitchen. " * 30
    hub = tmp_path / "hub"
    babilong, longbench = hub / "RMT-team" / "babilong-1k-samples", hub / "recursal" / "longbench-v2"
    for folder, name, split, file in ((babilong, "0k", "qa1", "data/qa1/0k.json"),
                                      (longbench, "graph_reasoning", "train", "data/graph.json")):  # fmt: skip
        (folder / file).parent.mkdir(parents=True)
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {file}\n---\n"
        )
    rows: list[dict[str, Any]] = [{"input": long, "question": "Where is Mary? ", "target": "kitchen"}] * 2
    (babilong / "data/qa1/0k.json").write_text(json.dumps(rows))
    asked = {"context": long, "question": "Where is she?", "choices": ["here", "there", "out", "up"], "answer": 1}
    (longbench / "data/graph.json").write_text(json.dumps([asked] * 2))
    arguments = f"pretrained={chatting},window=128,chunk_size=16,retriever=hashing,memory_layer=1,top_k=2"
    out = tmp_path / "out"
    more = ["--tasks", "babilong_qa1,longbench2_graph", "--output_path", str(out), "--log_samples"]
    server = FakeHub(hub)
    try:
        online = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = command_line(arguments, *more, "--apply_chat_template", "--fewshot_as_multiturn", "true", **online)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr[-3000:]
    found, samples = results(out)
    assert found["babilong_qa1"]["acc,none"] in (0, 1) and found["longbench2_graph"]["acc,none"] in (0, 1)
    prompt = samples["babilong_qa1"][0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("<user>") == 3 and prompt.count("<assistant>") == 3 and prompt.endswith("<assistant>")
    assert "Charlie is balcony.\n<user>" in prompt
    choices = samples["longbench2_graph"][0]["arguments"]
    assert [choices[f"gen_args_{n}"]["arg_1"].strip() for n in range(4)] == ["A", "B", "C", "D"]
    assert all(choices[f"gen_args_{n}"]["arg_0"].startswith("<user>Please read") for n in range(4))


def test_mistakes_are_told(backbone: Path) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size=0.*1 or more"),
        ({"batch_size": "many"}, "batch_size='many'.*auto"),
        ({"topk": 3}, "topk=3.*memory_layer"),
        ({"window": 100}, "window=100"),
        ({"top_k": 0}, "memory.top_k=0"),
    ):
        with pytest.raises(UserError, match=message):
            ours(backbone, **options)
