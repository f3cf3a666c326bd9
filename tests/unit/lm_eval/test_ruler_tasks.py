"""Documents of RULER by lm-eval's own functions: our tokenizer, number and texts; what would never end is told."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lightning_memlong.errors import UserError

pytest.importorskip("lm_eval")
wonderwords = pytest.importorskip("wonderwords")
from lightning_memlong.lm_eval import lm_eval_private, ruler_tasks  # noqa: E402
from lightning_memlong.lm_eval.answering import chat_text, cut_off, writing_options  # noqa: E402
from lightning_memlong.lm_eval.lm_eval_private import require_tokens, split_sentences, swapped  # noqa: E402
from lightning_memlong.lm_eval.ruler_tasks import RulerSource, make_documents, require_files  # noqa: E402
from tests.few_words import import_few_words  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def few_words() -> None:
    import_few_words()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def source(tiny_backbone: Path) -> RulerSource:
    """Its tokenizer counts words, whatever they are."""
    return RulerSource(AutoTokenizer.from_pretrained(tiny_backbone), seed=0)


@pytest.fixture
def essay(tmp_path: Path) -> str:
    (tmp_path / "essay.txt").write_text(" ".join(f"Sentence {n} says kan. Does it? It lor mis!" for n in range(400)))
    return str(tmp_path / "essay.txt")


def words(source: RulerSource, text: str) -> int:
    return len(source.tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    "task",
    ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", pytest.param("cwe", marks=pytest.mark.long), "fwe"],
)
def test_documents_of_tasks_that_need_no_text(task: str, source: RulerSource) -> None:
    state = random.getstate(), np.random.get_state()[1].copy()
    found = make_documents(source, task, 2048, 3)
    assert random.getstate() == state[0] and (np.random.get_state()[1] == state[1]).all()
    assert [d.prompt for d in make_documents(source, task, 2048, 2)] == [d.prompt for d in found[:2]]
    other = make_documents(RulerSource(source.tokenizer, seed=1), task, 2048, 1)[0]
    assert other.prompt != found[0].prompt
    for number, document in enumerate(found):
        assert (document.task, document.length, document.sample) == (task, 2048, number)
        assert 500 < words(source, document.prompt) <= 2048
        assert document.score(document.answer) == 1 and document.score("nothing of it") == 0
        assert all(document.prompt.count(needle) == 1 for needle in document.needles)
        assert len(document.needles) == (0 if task in ("cwe", "fwe") else len(document.answers))
        # Where lines are pieces of a template, lm-eval puts a space between question and beginning of the answer.
        end = document.question.split("?")[-1].strip()
        assert document.prompt.endswith(end) and end
        assert not document.options["do_sample"] and document.options["until"] == []


def test_an_answer_is_written_as_rulers_examples_write_it(source: RulerSource) -> None:
    vt, cwe = (make_documents(source, task, 2048, 1)[0] for task in ("vt", "cwe"))
    assert vt.answer == " " + " ".join(vt.answers) and len(vt.answers) == 5
    assert cwe.answer.startswith(f" 1. {cwe.answers[0]} 2. {cwe.answers[1]} ") and len(cwe.answers) == 10
    several = ruler_tasks.RulerDocument("niah_multivalue", 1, 0, "", "", ("1", "2"), (), {}, float)
    assert several.answer == " 1, 2"


def test_needles_in_another_text(source: RulerSource, essay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sentences are split by ours, where nltk's splitter cannot be had; afterwards everything is theirs again."""
    monkeypatch.setattr(lm_eval_private, "splitter_is_there", lambda: False)
    module = import_few_words()
    before = module.sent_tokenize, module.get_haystack, module.datasets
    found = make_documents(RulerSource(source.tokenizer, 0, haystack=essay), "niah_multivalue", 2048, 2)
    assert (module.sent_tokenize, module.get_haystack, module.datasets) == before
    for document in found:
        assert "Sentence 3 says kan. Does it? It lor mis!" in document.prompt
        assert len(document.answers) == 4 and document.score(", ".join(document.answers[:2])) == 0.5


def test_sentences_end_with_a_mark_and_a_space() -> None:
    assert split_sentences("A b. C? D e! F.g h") == ["A b.", "C?", "D e!", "F.g h"]


def squad(tmp_path: Path, questions: int) -> str:
    paragraphs = [
        {"context": f"Film {n} is {'kan ' * 40}", "qas": [{"question": f"What is {n}?", "is_impossible": False,
         "answers": [{"text": f"kan{n}"}, {"text": f"lor{n}"}]}]}
        for n in range(questions)
    ]  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return str(tmp_path / "squad.json")


def test_questions_from_files(source: RulerSource, tmp_path: Path) -> None:
    made = RulerSource(source.tokenizer, 0, squad=squad(tmp_path, 60))
    first, second = make_documents(made, "qa_1", 1024, 2)
    assert first.question == "Question: What is 0? Answer:" and first.answer == " kan0"
    assert "Film 0 is kan" in first.prompt and first.score("it is LOR0") == 0.5 and second.score("kan0") == 0
    films = [{"question": f"Which {n}?", "answer": f"mis{n}",
              "context": [[f"T{n}", ["mis ", "sin " * 20]], [f"U{n}", ["tur " * 20]]]} for n in range(60)]  # fmt: skip
    (tmp_path / "hotpot.json").write_text(json.dumps(films))
    made = RulerSource(source.tokenizer, 0, hotpotqa=str(tmp_path / "hotpot.json"))
    (found,) = make_documents(made, "qa_2", 1024, 1)
    assert found.answers == ("mis0",) and found.score("mis0") == 1 and "T0\nmis sin" in found.prompt
    with pytest.raises(UserError, match="evaluation.samples: qa_1 has not the 61 questions"):
        make_documents(RulerSource(source.tokenizer, 0, squad=squad(tmp_path, 60)), "qa_1", 1024, 61)


@pytest.mark.parametrize("text", ["no json", "{}", "[]", '{"data": [{}]}'])
def test_files_of_other_forms_are_told(text: str, source: RulerSource, tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(text)
    with pytest.raises(UserError, match="squad.json cannot be used .*dev-v2.0.json"):
        make_documents(RulerSource(source.tokenizer, 0, squad=str(tmp_path / "squad.json")), "qa_1", 1024, 1)


def test_what_would_never_end_is_told(byte_backbone: Path) -> None:
    """lm-eval's loops go on for ever where the smallest document of a task does not fit."""
    bytes_ = RulerSource(AutoTokenizer.from_pretrained(byte_backbone), seed=0)
    with pytest.raises(
        UserError, match="evaluation.lengths=4096 cannot be used for vt .*at most 500 tokens would have"
    ):
        make_documents(bytes_, "vt", 4096, 1)
    with pytest.raises(UserError, match="evaluation.lengths=1024 cannot be used for cwe .*at most 1024 tokens would"):
        make_documents(bytes_, "cwe", 1024, 1)
    with pytest.raises(UserError, match="evaluation.lengths=300 cannot be used for niah_single_1 .*leaves no room"):
        make_documents(bytes_, "niah_single_1", 300, 1)


def test_files_are_checked_before_anything_is_made(source: RulerSource, essay: str) -> None:
    for options, task, message in (
        ({}, "qa_2", "evaluation.hotpotqa=None.*we are offline"),
        ({"haystack": "/nowhere"}, "niah_multiquery", "evaluation.haystack='/nowhere'.*a file that is there"),
        ({"haystack": essay}, "niah_single_3", "essay.txt, 4800 tokens.*the longest document, 16384 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            require_files(RulerSource(source.tokenizer, 0, **options), ["vt", task], 16384)  # type: ignore[arg-type]
    require_files(RulerSource(source.tokenizer, 0, haystack=essay), ["vt", "niah_single_2"], 4096)


def test_no_network_is_told(source: RulerSource, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def refuse(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(import_few_words(), "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(UserError, match="evaluation.haystack=None: niah_single_2 needs the network .no route to host"):
        require_files(source, ["niah_single_2"], 4096)
    with pytest.raises(UserError, match="evaluation.squad=None: qa_1 needs the network .no route to host"):
        make_documents(source, "qa_1", 1024, 1)


def test_a_tokenizer_without_tokens_is_told() -> None:
    with pytest.raises(UserError, match="tokenizer='empty'.*this one makes none"):
        require_tokens(lambda text: {"input_ids": []}, "empty")


def test_names_are_as_before_whatever_happens() -> None:
    names = {"a": 1}
    with pytest.raises(KeyError):
        with swapped(names, {"a": 2, "b": 3}):
            assert names == {"a": 2, "b": 3}
            raise KeyError
    assert names == {"a": 1}


@pytest.fixture
def template() -> Iterator[Any]:
    def apply(messages: Any, tokenize: bool, add_generation_prompt: bool, continue_final_message: bool) -> str:
        assert not tokenize and add_generation_prompt is not continue_final_message
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text.removesuffix("</>") if continue_final_message else f"{text}<assistant>"

    yield SimpleNamespace(chat_template="yes", apply_chat_template=apply)


def test_an_answer_that_has_begun_stays_open_in_a_chat(template: Any, source: RulerSource) -> None:
    asked = [{"role": "user", "content": "Who?"}]
    assert chat_text(template, asked) == "<user>Who?</><assistant>"
    begun = [*asked, {"role": "assistant", "content": "It is"}]
    assert chat_text(template, begun, False) == "<user>Who?</><assistant>It is"
    chat = RulerSource(source.tokenizer, 0, chat_template=lambda *args, **_: chat_text(template, *args, **_))
    (document,) = make_documents(chat, "fwe", 2048, 1)
    assert document.prompt.startswith("<user>Read the following") and document.prompt.endswith("words are:")
    assert "<assistant>Answer: According" in document.prompt


def test_what_lies_before_the_window_is_whole_chunks() -> None:
    assert cut_off(100, 100, 16) == 0 and cut_off(101, 100, 16) == 16
    assert cut_off(160, 64, 16) == 96 and cut_off(10, 4, 16) == 6  # no chunk would be left


def test_options_of_a_task_are_those_of_generate() -> None:
    given = {"until": "x", "max_gen_toks": 3, "do_sample": True, "temperature": 0.0}
    assert writing_options(given) == (["x"], {"do_sample": False, "max_new_tokens": 3})
    sampled = {"temperature": 0.5, "do_sample": True, "max_new_tokens": 7}
    assert writing_options({"temperature": 0.5}, 7) == ([], sampled), "a temperature asks for sampling"
    assert writing_options({"temperature": 0.5, "do_sample": False}, 7)[1]["do_sample"] is False
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        found = writing_options({name: 5, "until": ["", "x"]})
        assert found == (["x"], {"do_sample": False, "max_new_tokens": 5}), name
    assert writing_options({"max_tokens": 5, "max_gen_toks": 3})[1]["max_new_tokens"] == 3
