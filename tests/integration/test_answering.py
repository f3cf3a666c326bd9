"""``train.py predict`` and ``chat``: read or open a bank, answer, show, write down."""

import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_memlong.cli.chat as chatting
import lightning_memlong.generation.long_context as long_text
from lightning_memlong.bank import MemoryBank
from lightning_memlong.cli.chat import main as chat
from lightning_memlong.cli.main import main
from lightning_memlong.generation import read_windows
from tests.integration.helpers import tiny, without_capacity
from tests.integration.test_cli import told


@pytest.fixture
def book(text_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f.read_text() for f in sorted(text_folder.glob("*.txt")))[:3000])
    return file


@pytest.fixture
def options(byte_backbone: Path, book: Path, tmp_path: Path) -> list[str]:
    return [*without_capacity(tiny(byte_backbone, book, tmp_path / "runs")), "--max_new_tokens", "12"]


def answered(tmp_path: Path) -> list[dict[str, Any]]:
    newest = max((tmp_path / "runs" / "memlong").glob("*/answers.jsonl"), key=lambda f: f.stat().st_mtime)
    return [json.loads(line) for line in newest.read_text().splitlines()]


def test_a_book_is_read_once_and_asked_again(
    options: list[str], tmp_path: Path, book: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "banks" / "book.safetensors"
    asked = ["predict", *options, "--bank", str(bank), "--prompt", '["kan lor", "mis tur"]']
    assert main(asked) == 0
    answers, beside = capfd.readouterr()
    assert "3,000 tokens in memory (188 chunks)" in beside and f"Bank: {bank}" in beside
    assert re.search(r"retrieved at \d+%, tokens [\d,]+ to [\d,]+, similarity", beside)
    first = answered(tmp_path)
    assert answers.strip() == "\n".join(a["text"] for a in first), "what is piped on are answers alone"
    assert [a["prompt"] for a in first] == ["kan lor", "mis tur"] and all(a["tokens_read"] == 3000 for a in first)
    text = book.read_text()
    for passage in first[0]["passages"]:
        assert passage["text"] == text[passage["start"] : passage["end"]], "a token is a byte"
    folder = next((tmp_path / "runs" / "memlong").iterdir())
    assert "**kan lor**" in (folder / "answers.md").read_text() and (folder / "config_predict.yaml").exists()
    written = bank.stat().st_mtime_ns
    assert main(asked) == 0
    assert "3,000 tokens found in" in capfd.readouterr().err and bank.stat().st_mtime_ns == written
    assert answered(tmp_path) == first
    book.write_text(text + "and so on " * 20)
    assert main(asked) == 0
    assert "3,200 tokens in memory" in capfd.readouterr().err, "what was added is read"
    assert int(MemoryBank.open(bank).ends()[0]) == 3200
    book.write_text("another " * 100)
    assert "holds another text than book.txt" in told(asked, capfd)
    assert int(MemoryBank.open(bank).ends()[0]) == 3200
    book.write_text(text)
    assert "retriever is 'hashing' there and 'bm25' here" in told([*asked, "--memory.retriever.name", "bm25"], capfd)


def test_several_documents_and_a_small_bank(
    options: list[str], text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    several = tmp_path / "several"
    several.mkdir()
    for name in ("a.txt", "b.txt"):
        (several / name).write_text((text_folder / "document-00.txt").read_text()[:900])
    (several / "empty.txt").write_text("")
    options = ["predict", *options, "--data.path", str(several), "--prompt", "kan", "--capacity", "256"]
    assert main(options) == 0
    assert "44 of 57 chunks evicted to stay within --capacity" in capfd.readouterr().err
    assert [a["document"] for a in answered(tmp_path)] == ["a.txt", "b.txt"]
    assert "bank='x'" in told([*options, "--bank", "x"], capfd)


def test_a_tuned_model_answers_in_bfloat16(options: list[str], text_folder: Path, tmp_path: Path) -> None:
    fit = [
        *options[:-2],
        "--data.path",
        str(text_folder),
        "--validate_first",
        "false",
        "--trainer.limit_val_batches",
        "0",
    ]
    assert main(["fit", *fit]) == 0
    asked = ["predict", *options, "--prompt", "kan lor", "--trainer.precision", "bf16-mixed"]
    assert main([*asked, "--ckpt_path", "last"]) == 0
    tuned = answered(tmp_path)[0]
    assert tuned["passages"]
    sampled = ["--generation", "{do_sample: true, temperature: 1.5}", "--seed_everything", "7"]
    assert main([*asked, *sampled]) == 0
    assert answered(tmp_path)[0]["text"] != tuned["text"]


def interrupted(*args: Any, **options: Any) -> Any:
    for number, count in enumerate(read_windows(*args, **options)):
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        yield count


def test_ctrl_c_keeps_what_was_read(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "book.safetensors"
    asked = ["predict", *options, "--prompt", "kan lor"]
    for file, more in ((None, "and --bank"), (bank, "go on with the same command.")):
        monkeypatch.setattr(long_text, "read_windows", interrupted)
        with pytest.raises(SystemExit) as stop:
            main([*asked, *([] if file is None else ["--bank", str(file)])])
        out = capfd.readouterr().err
        assert stop.value.code == 130 and more in out and "Interrupted: 304 of 3,000" in out
        monkeypatch.undo()
    kept = out.split("What was read is in ")[1].split(";")[0]
    assert kept == str(bank) and int(MemoryBank.open(bank).ends()[0]) == 304
    assert main([*asked, "--bank", str(bank)]) == 0
    assert "304 tokens found" in capfd.readouterr().err
    resumed = answered(tmp_path)
    assert main(asked) == 0
    assert [a["text"] for a in answered(tmp_path)] == [a["text"] for a in resumed]


def test_a_full_disk_costs_the_file_and_not_the_answers(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    bank = tmp_path / "book.safetensors"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        message = told(["predict", *options, "--prompt", "kan lor", "--bank", str(bank)], capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "the bank cannot be written" in message and answered(tmp_path)[0]["text"]
    assert not bank.exists() and not list(tmp_path.glob(".book*"))


MISTAKES = {
    "no prompt": ([], "prompt=''"),
    "empty prompt": (["--prompt", " "], "prompt=' '"),
    "long prompt": (["--prompt", "x" * 65], "'65 tokens'"),
    "no document": (["--prompt", "x", "--data.path", "nowhere.txt"], "nowhere.txt"),
    "default text": (["--prompt", "x", "--data.path", "null"], "--data.path book.txt"),
    "size of training banks": (["--prompt", "x", "--memory.capacity", "256"], "give --capacity"),
    "no memory": (["--prompt", "x", "--memory.enabled", "false"], "memory.enabled=False"),
    "leaking query": (["--prompt", "x", "--memory.query", "current"], "memory.query='current'"),
    "unwritable": (["--prompt", "x", "--bank", "/proc/nowhere/bank"], "bank: cannot write"),
    "not a bank": (["--prompt", "x", "--bank", __file__], "damaged or cut short"),
    "no template": (["--prompt", "x", "--chat", "true"], "no chat template"),
    "unknown option": (["--prompt", "x", "--generation", "{temprature: 2}"], "temprature"),
    "bad value": (["--prompt", "x", "--generation", "{do_sample: true, temperature: -1.0}"], "temperature"),
    "several texts": (["--prompt", "x", "--generation", "{num_return_sequences: 2}"], "options that give one text"),
    "a folder for a bank": (["--prompt", "x", "--bank", str(Path(__file__).parent)], "bank.safetensors"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(
    mistake: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given, expected = MISTAKES[mistake]
    monkeypatch.setattr(long_text, "read_windows", lambda *_, **__: pytest.fail("nothing is to be read for it"))
    assert expected in told(["predict", *options, *given], capfd)
    assert not list((tmp_path / "runs").rglob("*.*")), "and nothing is written"


@pytest.mark.parametrize("mistake", ["unknown option", "bad value", "a folder for a bank"])
def test_mistakes_of_a_chat_are_told(
    mistake: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given, expected = MISTAKES[mistake]
    monkeypatch.setattr(long_text, "read_windows", lambda *_, **__: pytest.fail("nothing is to be read for it"))
    assert expected in told(["chat", *options, *given[2:]], capfd)


def test_two_texts_for_a_chat_are_told(book: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert chat([str(book), "--data.path", str(book)]) == 2
    assert "Allowed: one text. Fix: leave --data.path out" in capfd.readouterr().err


def test_a_document_of_two_splits_is_answered_once(
    options: list[str], book: Path, text_folder: Path, tmp_path: Path
) -> None:
    for number, folder in enumerate(("train", "held")):
        (tmp_path / "texts" / folder).mkdir(parents=True)
        (tmp_path / "texts" / folder / f"book [bold]{number}.txt").write_text(book.read_text()[:400])
    splits = ["--data.path", str(tmp_path / "texts"), "--data.validation_split", "held", "--data.test_split", "held"]
    assert main(["predict", *options, *splits, "--prompt", "kan lor"]) == 0
    assert sorted(a["document"] for a in answered(tmp_path)) == ["held/book [bold]1.txt", "train/book [bold]0.txt"]


def test_a_binary_book_is_told(options: list[str], book: Path, capfd: pytest.CaptureFixture[str]) -> None:
    book.write_bytes(b"\x80\x81\xfe\xff" * 300)
    assert "book.txt" in (message := told(["predict", *options, "--prompt", "x"], capfd)) and "UTF-8" in message


def test_chatting(
    options: list[str], book: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["kan lor", "/passages", "", "x" * 65, "/help", "/new", "kan lor"])

    def person(shown: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", person)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)  # a person types, nothing is piped in
    monkeypatch.chdir(book.parent)
    at = options.index("--data.path")
    assert chat([book.name, *options[:at], *options[at + 2 :]]) == 0
    out = capfd.readouterr().err
    assert "3,000 tokens in memory. /help" in out and "/new        begin" in out
    assert out.count("  retrieved at ") >= 6 and "'66 tokens'" in out
    passages = [line for line in out.splitlines() if line and line in book.read_text()]
    assert passages, "whole passages are shown when asked for"


def test_questions_are_piped_in_and_answers_out(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "questions"
    file.write_bytes(b"kan lor\nmis \xff tur\n")
    with file.open() as questions:
        monkeypatch.setattr("sys.stdin", questions)
        assert main(["chat", *options]) == 0
    answers, beside = capfd.readouterr()
    assert "tokens in memory" not in answers and "retrieved at" not in answers and "> " not in answers
    assert beside.count("retrieved at") >= 2 and answers.strip()


def test_an_answer_broken_off_ends_there(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["kan lor", "mis tur", "/quit"])
    monkeypatch.setattr("builtins.input", lambda shown: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)  # a person types, nothing is piped in
    said: list[list[int]] = []
    begun = chatting.TextStreamer.put

    def put(self: Any, value: Any) -> None:
        said.append(value.flatten().tolist())
        if len(said) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        begun(self, value)

    monkeypatch.setattr(chatting.TextStreamer, "put", put)
    assert main(["chat", *options]) == 0
    turns = [number for number, ids in enumerate(said) if len(ids) > 1]
    answer = [token for ids in said[1 : turns[1]] for token in ids]
    assert 3 <= len(answer) < 12, "12 were to be written"
    assert said[turns[1]] == [*said[0], *answer, *said[turns[1]][-len("\nmis tur") :]], (
        "the next turn goes on from there"
    )
