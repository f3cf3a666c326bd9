"""Reading texts into banks and writing about them, in Python."""

import copy
import gc
import multiprocessing
import os
import pickle
import re
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_memlong import MemLong, MemoryBank, MemoryConfig, UserError
from lightning_memlong.cli.main import main
from lightning_memlong.config import RetrieverConfig
from lightning_memlong.generation import LocalContext, read_windows
from lightning_memlong.retrieval import retrieve_for
from tests.integration.helpers import tiny

SETTINGS = {"chunk_size": 16, "capacity": 256, "top_k": 2, "retriever": {"name": "hashing"}}


@pytest.fixture(scope="module")
def book(text_folder: Path) -> str:
    return " ".join(f.read_text() for f in sorted(text_folder.glob("*.txt")))[:6000]


@pytest.fixture(scope="module")
def model(byte_backbone: Path) -> MemLong:
    return MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1)


def same_banks(a: MemoryBank, b: MemoryBank, row: int = 0, other: int = 0) -> None:
    mine, theirs = (bank.view(r).state_dict()["ledgers"][0] for bank, r in ((a, row), (b, other)))
    for name in ("keys", "values", "positions", "lengths", "embeddings", "tokens"):
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-5, rtol=1e-4, msg=name)


def test_everything_is_read_and_kept(model: MemLong, book: str) -> None:
    bank = model.read(book, window=64, progress=False)
    entries, ids = bank.entries(0), model.retrieval.tokenizer(book)["input_ids"]
    assert int(entries.lengths.sum()) == len(ids) == int(bank.ends()[0]) and bank.evictions == 0
    assert bank.row(0).tokens.tolist() == ids and len(ids) > 4 * 256, "the configured capacity is no limit"
    assert entries.positions.tolist() == list(range(0, len(ids), 16))
    chunk = model.retrieval.tokenizer.decode(ids[160:176])
    assert torch.allclose(entries.embeddings[10], model.retrieval.retriever.encode([chunk])[0])
    # The keys of a chunk are those of the window it was read in, whose first chunk is there for context only.
    window = model(torch.tensor([ids[144:208]]))
    found = bank.gather(torch.tensor([[10, 11, 12]]), count=False)
    assert found is not None
    torch.testing.assert_close(found.keys[:, 0], window.keys[:, 0, :, 16:], atol=2e-5, rtol=1e-4)


def test_only_layers_that_are_needed_are_computed(byte_backbone: Path, book: str) -> None:
    model = MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1, source="single", retrieval_layers=[1, 3])
    ran: list[int] = []
    for number, layer in enumerate(model.backbone.get_decoder().layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    few = model.capture(torch.arange(64)[None])
    assert ran == [0], "layer 1 gives its keys before it is done"
    whole = model(torch.arange(64)[None])
    assert torch.equal(few["keys"], whole.keys) and torch.equal(few["values"], whole.values)
    ran.clear()
    hidden = model.capture(torch.arange(64)[None], hidden=True)["hidden"]
    assert ran == [0, 1] and torch.equal(hidden, whole.memory_hidden)


def test_texts_side_by_side_are_read_as_each_alone(model: MemLong, book: str) -> None:
    texts = [book[:1500], book[2000:2700], book[:40]]
    bank = model.read(texts, window=64, progress=False)
    for row, text in enumerate(texts):
        same_banks(bank, model.read(text, window=64, progress=False), row)
    prompt, options = "kan lor", {"max_new_tokens": 40, "min_new_tokens": 40, "window": 32}
    for row, text in enumerate(texts):
        alone = model.generate(prompt, model.read(text, window=64, progress=False), **options)
        assert model.generate(prompt, bank, row=row, **options) == alone


def test_reading_goes_on_where_it_ended(model: MemLong, book: str, tmp_path: Path) -> None:
    whole = model.read(book, window=64, progress=False)
    begun = model.read(book[: 16 * 100], window=64, progress=False)
    begun.save(tmp_path / "bank.safetensors")
    again = MemoryBank.open(tmp_path / "bank.safetensors")
    assert model.read(book, again, window=64, progress=False) is again
    assert int(again.ends()[0]) == len(again.row(0).tokens) == int(whole.ends()[0])
    assert torch.equal(again.row(0).tokens, whole.row(0).tokens)
    assert again.entries(0).positions.tolist() == whole.entries(0).positions.tolist()
    state = again.entries(0).positions.clone()
    model.read(book, again, window=64, progress=False)
    assert torch.equal(again.entries(0).positions, state), "there is nothing left to read"
    more = model.read("sin tur max", again, window=64, progress=False)
    assert more.entries(0).positions[-1] == len(book)
    assert model.retrieval.tokenizer.decode(more.row(0).tokens[len(book) :]) == "sin tur max"


def test_a_small_bank_evicts_what_is_not_used(model: MemLong, book: str) -> None:
    bank = model.read(book, window=64, capacity=512, progress=False)
    assert bank.evictions > 0 and bank.capacity == 512 and not bank.keeps_everything
    assert bank.entries(0).counters.sum() > 0, "it retrieves while it reads, so that it knows"
    assert len(bank.row(0).tokens) == len(book)
    before = bank.insertions
    model.read("sin tur max" * 30, bank, window=64, progress=False)
    assert bank.insertions > before and bank.capacity == 512


def test_ctrl_c_ends_reading_between_windows(
    model: MemLong, book: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lightning_memlong.generation.long_context as long_text

    def pressed(*args: Any, **options: Any) -> Any:
        for number, count in enumerate(read_windows(*args, **options)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield count

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(long_text, "read_windows", pressed)
    bank = model.read(book, window=64, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert int(bank.ends()[0]) == 64 + 3 * 48
    assert "Interrupted: 208 of 6,000 tokens were read and are kept" in capsys.readouterr().err
    monkeypatch.undo()
    same_banks(model.read(book, bank, window=64, progress=False), model.read(book, window=64, progress=False))
    thread = threading.Thread(target=lambda: model.read(book[:100], window=64, progress=False))
    thread.start()
    thread.join()


def test_questions_leave_the_bank_as_it_was(model: MemLong, book: str) -> None:
    bank = model.read(book, window=64, progress=False)
    before = bank.state_dict()["ledgers"][0]
    kept = {k: v.clone() for k, v in before.items() if isinstance(v, torch.Tensor)}
    first = model.generate("kan lor", bank, window=32, max_new_tokens=200, min_new_tokens=200)
    after = bank.state_dict()["ledgers"][0]
    for name, value in kept.items():
        if name in ("counters", "scores", "used"):
            continue
        assert torch.equal(value, after[name]), name
    assert after["counters"].sum() > 0 and int(after["used"].max()) < after["serial"]
    assert after["serial"] == before["serial"] and after["end"] == before["end"]
    assert model.generate("kan lor", bank, window=32, max_new_tokens=200, min_new_tokens=200) == first
    assert model.generate("kan lor", window=32, max_new_tokens=200, min_new_tokens=200) != first, "memory matters"


def test_a_conversation_goes_on(model: MemLong, book: str) -> None:
    bank = model.read(book, window=64, progress=False)
    talk = model.converse(bank, window=64)
    options = {"max_new_tokens": 30, "min_new_tokens": 30}
    answers = [talk.say(q, **options) for q in ("kan lor", " mis tur", " rax sin")]
    assert talk.context.moved > 0 and len(bank.row(0).tokens) > len(book), "the older half has moved into the bank"
    assert all(p.text and p.end - p.start <= 16 for p in talk.passages) and talk.passages
    assert talk.passages == sorted(talk.passages, key=lambda p: -p.score)
    talk.close()
    assert len(bank.row(0).tokens) == len(book)
    again = model.converse(bank, window=64)
    assert [again.say(q, **options) for q in ("kan lor", " mis tur", " rax sin")] == answers
    again.close()


def test_conversations_on_one_row_leave_each_other_alone(model: MemLong, book: str) -> None:
    """What one closes is its own: not what was read meanwhile, nor what another has moved in, nor its lock."""
    bank = model.read(book[:1000], window=64, progress=False)
    long: dict[str, Any] = {"max_new_tokens": 60, "min_new_tokens": 60}
    with model.converse(bank, window=64) as first:
        first.say("first", max_new_tokens=2)
        model.read(book[:1500], bank, window=64, progress=False)
        assert first.context.origin == 1000
        first.say(" then", max_new_tokens=2)
        assert first.context.origin == 1500, "it goes on after what is there now"
    assert bank.ends().tolist() == [1500]
    second = model.converse(bank, window=64)
    second.say("kan lor " * 5, **long)
    moved, held = second.context.moved, len(bank.entries(0))
    assert moved and bank.ends().tolist() == [1500 + moved]
    model.generate("x?", bank, window=64, max_new_tokens=2)
    with model.converse(bank, window=64) as third:
        third.say("x?", max_new_tokens=2)
    assert len(bank.entries(0)) == held, "others have closed, and taken nothing"
    for refused in (
        lambda: bank.save("/nowhere/bank"),
        lambda: model.generate("kan lor " * 5, bank, window=64, **long),
    ):
        with pytest.raises(UserError, match="close that conversation first"):
            refused()
    second.say(" then ", **long)
    assert all(passage.text for passage in second.passages) and bank.ends().tolist() == [1500 + second.context.moved]
    bank.reset()
    with pytest.raises(UserError, match="begin a new conversation"):
        second.say(" then ", max_new_tokens=2)


def test_a_conversation_nobody_holds_any_more_is_closed(model: MemLong, book: str, tmp_path: Path) -> None:
    bank = model.read(book[:1000], window=64, progress=False)
    model.converse(bank, window=64).say("kan lor " * 5, max_new_tokens=60, min_new_tokens=60)
    gc.collect()
    assert MemoryBank.open(bank.save(tmp_path / "bank")).ends().tolist() == [1000]


def test_what_lies_near_stays_near_once_the_window_has_moved(byte_backbone: Path, book: str) -> None:
    """A turn whose tokens push older ones out of the window: what it retrieved stands where it did in the text."""
    near = {"position": "fixed", "memory_near": 64, "memory_distance": 200, "memory_reference": None}
    model = MemLong.from_pretrained(byte_backbone, {**SETTINGS, "selection": "recent"}, memory_layer=1, **near)
    bank = model.read(book[:160], window=64, progress=False)
    context = LocalContext(model.long_context, bank, 0, 64)
    ids = torch.from_numpy(model.long_context.tokenise(book[500:600]))[None].long()
    for end in (50, 90):
        context.retrieve_for_prompt(model.long_context.embed_texts(["kan"])[0])
        context.logits(ids[:, :end])
    assert context.moved and context.retrieved is not None
    assert context.retrieved.begin is not None and context.retrieved.begin.tolist() == [160 + context.moved]
    context.close()


def test_a_short_bank_beside_a_long_window(model: MemLong, book: str) -> None:
    bank = model.read(book[:500], window=64, capacity=64, progress=False)
    assert model.generate(book[:250], bank, window=256, max_new_tokens=200, min_new_tokens=200)
    assert len(bank.entries(0)) <= 4
    with pytest.raises(UserError, match="window=128.*at most 64.*give a smaller one"):
        model.read(book[:900], bank, window=128, progress=False)
    assert bank.ends().tolist() == [500]


def test_a_text_that_is_the_beginning_of_what_was_read_is_another(model: MemLong, book: str) -> None:
    bank = model.read(book[:500], window=64, progress=False)
    model.read(book[:496], bank, window=64, progress=False)
    assert bank.ends().tolist() == [996] and len(bank.row(0).tokens) == 996


def test_a_row_that_has_ended_uses_nothing(model: MemLong, book: str) -> None:
    short, long = book[:300], book[1000:3500]
    beside = model.read([short, long], window=64, capacity=1024, progress=False)
    alone = model.read(short, window=64, capacity=1024, progress=False)
    assert torch.equal(beside.entries(0).counters, alone.entries(0).counters) and float(alone.entries(0).counters.sum())
    assert torch.equal(beside.row(0).idle, alone.row(0).idle)


def test_each_text_has_a_random_draw_of_its_own(byte_backbone: Path, book: str) -> None:
    """The control is drawn anew for each document, else documents of one length would all share one draw."""
    retrieval = (model := MemLong.from_pretrained(byte_backbone, SETTINGS | {"selection": "random"})).retrieval
    bank = model.read([book[start : start + 1000] for start in (0, 1, 2, 0)], window=64, progress=False)
    found = [retrieve_for(retrieval, bank.view(row), [torch.zeros(1, 256)]) for row in range(4)]
    places = [tuple(sorted(one.positions[0].tolist())) for one in found if one is not None]
    assert len(places) == 4 and places[3] == places[0] and len({*places}) == 3


def test_what_is_saved_is_loaded_with_its_memory(byte_backbone: Path, tmp_path: Path) -> None:
    model = MemLong.from_pretrained(byte_backbone, {**SETTINGS, "selection": "mix"}, memory_layer=1, position="zero")
    again = MemLong.from_pretrained(model.save_pretrained(tmp_path / "saved"))
    assert again.long_context.config == model.long_context.config and again.layout == model.layout
    fixed = MemLong.from_pretrained(tmp_path / "saved", position="fixed").layout
    assert fixed == MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1, position="fixed").layout


def test_a_turn_that_fails_is_as_if_it_had_not_been(model: MemLong, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = model.read(book, window=64, progress=False)
    options = {"max_new_tokens": 30, "min_new_tokens": 30}
    with model.converse(bank, window=64) as talk:
        first = talk.say("kan lor", **options)
    for refused in ({"num_beams": 2, "max_new_tokens": 90, "min_new_tokens": 90}, {"temprature": 2}):
        with model.converse(bank, window=64) as talk:
            assert talk.say("kan lor", **options) == first
            with pytest.raises(UserError):
                talk.say(" rax sin", **refused)
            talk.say(" mis tur", **options)
            text = model.retrieval.tokenizer.decode(talk.context.ids[0])
            assert text.startswith(f"kan lor{first} mis tur"), "read anew, without the turn that failed"
    assert len(bank.row(0).tokens) == len(book)

    def broken(self: Any, ids: Any, last: int = 1, goes_on: bool = False) -> Any:
        raise KeyboardInterrupt

    with model.converse(bank, window=64) as talk:
        assert talk.say("kan lor", **options) == first
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("lightning_memlong.generation.local_context.LocalContext.logits", broken)
            talk.say(" rax sin", **options)
        assert talk.context.ids.shape[1] == 0 and len(talk.say(" mis tur", **options)) > 0


def test_beams_and_samples_turn_after_turn(model: MemLong, book: str) -> None:
    bank = model.read(book, window=64, progress=False)
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        with model.converse(bank, window=128) as talk:
            for question in ("kan lor", " mis tur", " rax sin"):
                talk.say(question, max_new_tokens=20, min_new_tokens=3, **options)
            found = talk.say(" rax", max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True)
            assert found.sequences.shape[0] == 1
            assert talk.say("kan", max_new_tokens=3) is not None
            with pytest.raises(UserError, match="one sequence"):
                talk.say("mis", max_new_tokens=128, min_new_tokens=128, num_beams=2)


@pytest.mark.parametrize("how", [{"dtype": "int8"}, {"storage": "host"}, {"storage": "disk"}, {"capacity": 512}])
def test_conversations_on_any_bank(byte_backbone: Path, book: str, how: dict[str, Any]) -> None:
    capacity = {"capacity": how.pop("capacity")} if "capacity" in how else {}
    model = MemLong.from_pretrained(byte_backbone, SETTINGS | how, memory_layer=1)
    bank = model.read([book, book[:900]], window=64, progress=False, **capacity)
    kept = [bank.entries(row).positions.clone() for row in (0, 1)]
    with model.converse(bank, row=1, window=64) as talk:
        texts = [talk.say(q, max_new_tokens=60, min_new_tokens=60) for q in ("kan lor", " mis tur", " rax sin")]
        assert talk.context.moved >= 96 and len(bank.entries(1)) > len(kept[1])
        with pytest.raises(UserError, match="open conversation"):
            model.read(["more", "more"], bank, progress=False)
        again = model.converse(bank, row=1, window=64)
        again.say("kan lor", max_new_tokens=20)
        with pytest.raises(UserError, match="open conversation"):
            again.say(" mis tur", max_new_tokens=60, min_new_tokens=60)
    assert all(torch.equal(bank.entries(row).positions, kept[row]) for row in (0, 1))
    evicted = bank.evictions
    with model.converse(bank, row=1, window=64) as talk:
        assert [talk.say(q, max_new_tokens=60, min_new_tokens=60) for q in ("kan lor", " mis tur", " rax sin")] == texts
    assert bank.evictions == evicted, "what was read does not make way for what is said about it"


def test_a_text_that_goes_on_in_mid_token_is_read_once(model: MemLong, book: str) -> None:
    bank = model.read(book[:1000], window=64, progress=False)
    other = book[:997] + "XYZ and on " * 30
    model.read(other, bank, window=64, progress=False)
    whole = model.read(other, window=64, progress=False)
    assert torch.equal(bank.row(0).tokens, whole.row(0).tokens)
    for name in ("positions", "lengths", "embeddings"):
        assert torch.equal(getattr(bank.entries(0), name), getattr(whole.entries(0), name)), name


def test_messages_are_written_by_the_chat_template(byte_backbone: Path) -> None:
    model = MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1)
    tokenizer = model.retrieval.tokenizer
    with pytest.raises(UserError, match="no chat template"):
        model.generate([{"role": "user", "content": "kan"}])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = model.converse(window=128)
    first = talk.say([{"role": "user", "content": "kan"}], max_new_tokens=5, min_new_tokens=5)
    talk.say([{"role": "user", "content": "lor"}], max_new_tokens=5, min_new_tokens=5)
    written = tokenizer.decode(talk.context.ids[0])
    assert written.startswith(f"[user]kan[end][assistant]{first}[end][user]lor[end][assistant]")
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content.strip()")
    trimming = model.converse(window=128)
    letters = tokenizer("ab ")["input_ids"]
    plain = {"prefix_allowed_tokens_fn": lambda *_: letters, "do_sample": True, "max_new_tokens": 9}
    first = trimming.say([{"role": "user", "content": "kan"}], **plain)
    trimming.say([{"role": "user", "content": "lor"}], max_new_tokens=5, min_new_tokens=5)
    written = tokenizer.decode(trimming.context.ids[0])
    assert written.startswith(f"[user]kan[end][assistant]{first}[end][user]lor[end][assistant]"), first


@pytest.mark.parametrize("retriever", ["hidden", "bm25", "hashing", "hybrid"])
@pytest.mark.parametrize("selection", ["similarity", "recent", "random", "mix", "neighbours"])
def test_any_way_of_choosing(byte_backbone: Path, book: str, retriever: str, selection: str) -> None:
    memory = MemoryConfig(chunk_size=16, top_k=2, newest=0.5, retriever=RetrieverConfig(retriever), selection=selection)
    model = MemLong.from_pretrained(byte_backbone, memory, memory_layer=1)
    bank = model.read(book[:1600], window=64, progress=False)
    talk = model.converse(bank, window=48)
    talk.say(book[800:832], max_new_tokens=60, min_new_tokens=60)
    assert talk.passages
    if selection in ("similarity", "neighbours") and retriever != "hidden":  # random weights do not tell texts apart
        assert {p.start for p in talk.passages} & {784, 800, 816}, "what is asked about is found"
    talk.close()


def test_stop_texts_streamers_and_several_answers(model: MemLong, book: str) -> None:
    bank = model.read(book[:800], window=64, progress=False)
    letters = model.retrieval.tokenizer("abcdefghijklmnop")["input_ids"]  # others make no text by themselves
    plain = {"max_new_tokens": 60, "prefix_allowed_tokens_fn": lambda *_: letters}
    torch.manual_seed(0)
    whole = model.generate("kan lor", bank, do_sample=True, **plain)
    torch.manual_seed(0)
    assert model.generate("kan lor", bank, do_sample=True, stop_strings=[whole[5:8]], **plain) == whole[:8]
    several = model.generate("kan", bank, max_new_tokens=8, do_sample=True, num_return_sequences=3, temperature=2.0)
    assert len(several) == 3 and len(set(several)) > 1
    seen: list[int] = []
    streamer = type("S", (), {"put": lambda self, v: seen.extend(v.flatten().tolist()), "end": lambda self: None})()
    text = model.generate("kan lor", bank, max_new_tokens=6, min_new_tokens=6, streamer=streamer)
    assert model.retrieval.tokenizer.decode(seen) == "kan lor" + text


def test_token_ids_are_read_as_the_text_they_are_of(model: MemLong, book: str) -> None:
    texts = [book[:200], book[300:420]]
    tokenizer = model.retrieval.tokenizer
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    several = model.read(texts, window=64, progress=False)
    padded = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    assert padded["attention_mask"].min() == 0
    for given in (ids, [torch.tensor(row) for row in ids], padded, {"input_ids": ids}, tuple(texts)):
        bank = model.read(given, window=64, progress=False)
        for row in range(2):
            same_banks(bank, several, row, row)
    for one in (ids[0], torch.tensor(ids[0]), np.array(ids[0]), tokenizer(texts[0], return_tensors="pt"), texts[:1]):
        bank = model.read(one, window=64, progress=False)
        assert bank.rows == 1
        same_banks(bank, several)


def test_several_prompts_are_answered_as_one_after_the_other(model: MemLong, book: str) -> None:
    bank = model.read([book[:1200], book[1200:2000]], window=64, progress=False)
    prompts, how = ["kan lor", "mis tur ras", "x"], {"max_new_tokens": 8, "window": 64}
    alone = [model.generate(prompt, bank, row=row, **how) for prompt, row in zip(prompts, (0, 1, 1), strict=True)]
    assert model.generate(prompts, bank, row=[0, 1, 1], **how) == alone
    assert model.generate(prompts[:1], bank, **how) == alone[:1], "a list for a list"
    asked = [model.generate(prompt, bank, query="mis", **how) for prompt in prompts]
    assert model.generate(prompts, bank, query="mis", **how) == asked
    assert model.generate(prompts, bank, query=["mis"] * 3, **how) == asked
    assert model.generate(prompts[:2], **how) == [model.generate(prompt, **how) for prompt in prompts[:2]]
    found = model.generate(prompts, bank, return_dict_in_generate=True, num_return_sequences=2, num_beams=2, **how)
    assert [len(one.sequences) for one in found] == [2, 2, 2]
    counted = [bank.entries(row).counters.clone() for row in (0, 1)]
    for bad, told in (
        ({"row": [0, 1]}, "row='2 values'"), ({"query": ["a"]}, "query='1 values'"), ({"row": [0, 0, 2]}, "row=2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(told)):
            model.generate(prompts, bank, **bad, **how)
    with pytest.raises(UserError, match="prompt='65 tokens'"):
        model.generate([*prompts, "x" * 65], bank, **how)
    assert all(torch.equal(bank.entries(row).counters, counted[row]) for row in (0, 1)), "nothing was asked"


NOT_TEXT: list[Any] = [
    None, b"bytes", [1, 2, "x"], {}, [], 3, 2.5, [0.5], [[]], [None], torch.zeros(2, 2, 2), [-1], {"ids": [1]},
    {"input_ids": "x"}, {"input_ids": []}, [[1], "x"], [b"x"],
]  # fmt: skip


@pytest.mark.parametrize("given", NOT_TEXT, ids=lambda given: f"{type(given).__name__} {given}"[:30])
def test_what_is_no_text_is_told_in_one_line(model: MemLong, given: Any) -> None:
    with pytest.raises(UserError, match="cannot be read. Allowed: a text, several texts, or token ids"):
        model.read(given)


def tokens_in_another_process(model: MemLong, bank: MemoryBank, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(model.generate("kan lor", bank, max_new_tokens=12, window=32))


@pytest.mark.parametrize("how", [{}, {"storage": "host"}, {"storage": "disk"}, {"policy": "score"}])
def test_a_model_and_its_bank_go_to_another_process(byte_backbone: Path, book: str, how: dict[str, Any]) -> None:
    """As ddp_spawn, Ray and multiprocessing send them, by pickle; and copies are of their own."""
    model = MemLong.from_pretrained(byte_backbone, {**SETTINGS, **how}, memory_layer=1)
    bank = model.read(book[:1000], window=64, progress=False, **({"capacity": 256} if "policy" in how else {}))
    written = model.generate("kan lor", bank, max_new_tokens=12, window=32)
    sent_model, sent_bank = pickle.loads(pickle.dumps((model, bank)))
    same_banks(sent_bank, bank)
    assert sent_model.generate("kan lor", sent_bank, max_new_tokens=12, window=32) == written
    copied = copy.deepcopy(bank)
    model.read(book[1000:1400], copied, window=64, progress=False)
    assert int(copied.ends()[0]) > int(bank.ends()[0])
    if not how:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=tokens_in_another_process, args=(model, bank, queue))
        process.start()
        assert queue.get(timeout=120) == written
        process.join()


def test_bad_input_is_told(model: MemLong, byte_backbone: Path, book: str, tmp_path: Path) -> None:
    bank = model.read(book[:800], window=64, progress=False)
    size, keeps = len(bank.entries(0)), MemLong.from_pretrained(byte_backbone, {**SETTINGS, "policy": "none"})
    for given, message in (
        (lambda: model.generate(" \n", bank), "prompt=.*some text"),
        (lambda: model.generate([], bank), "prompt=.*messages with role and content"),
        (lambda: model.generate("x" * 70, bank, window=64), "prompt='70 tokens'.*the window.*model.read"),
        (lambda: model.generate("kan", bank, temprature=2), "generation: .*temprature"),
        (lambda: model.generate("kan", bank, row=1), "row=1.*0 to 0"),
        (lambda: model.generate("kan", bank, window=40), "window=40.*multiple of memory.chunk_size=16"),
        (lambda: model.generate("kan", bank, window=32, num_beams=2, min_new_tokens=60, max_new_tokens=60), "one seq"),
        (lambda: model.read("", bank), "text=''.*some text"),
        (lambda: model.read(["kan", " "]), "text 2 of several=' '"),
        (lambda: model.read(["kan", "lor"], bank), "text='2 texts'.*as many texts as the bank has rows, 1"),
        (lambda: model.read(book, capacity=32, window=64), "capacity=32.*at least the window"),
        (lambda: model.read(book, capacity="64", window=64), "capacity='64'.*a whole number"),
        (lambda: model.read(book, window=64.0), "window=64.0.*a whole number"),
        (lambda: model.read([5, 999]), "text='token 999'.*ids below 257"),
        (lambda: model.generate(None, bank), "prompt=None.*a text, messages, or a list of either"),
        (lambda: model.generate("kan", bank, row="0"), "row='0'.*a whole number"),
        (lambda: model.generate("kan", bank, guidance_scale=1.5), "guidance_scale=1.5.*leave it out"),
        (lambda: model.generate("kan", memory="bank.safetensors"), "memory='bank.safetensors'.*MemoryBank.open"),
        (lambda: MemoryBank(storage="nowhere"), "storage='nowhere'.*one of device, host, disk"),
        (lambda: MemLong.from_pretrained(byte_backbone, "x"), "memory='x'.*options of it by name"),
        (lambda: MemLong.from_pretrained(byte_backbone, tuning={"mod": "full"}), "tuning.mod='full'.*one of mode"),
        (lambda: keeps.read(book, capacity=64, window=64), "capacity=64.*memory.policy=none"),
        (lambda: MemLong.from_pretrained(byte_backbone, {"top": 3}), "memory.top=3.*one of .*top_k"),
        (lambda: MemLong.from_pretrained(byte_backbone, {"query": "current"}), "memory.query='current'.*previous"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            given()
    assert len(bank.entries(0)) == size
    bank.save(tmp_path / "bank")
    for other, message in (
        ({"memory": {**SETTINGS, "chunk_size": 32}, "memory_layer": 1}, "chunk_size is '16' there and '32' here"),
        ({"memory": {**SETTINGS, "retriever": {"name": "bm25"}}, "memory_layer": 1}, "retriever is 'hashing' there"),
        ({"memory": SETTINGS, "memory_layer": 2}, "source is 'per_layer of layers .1, 2, 3.' there"),
    ):
        with pytest.raises(UserError, match=message):
            MemLong.from_pretrained(byte_backbone, **other).generate("kan", MemoryBank.open(tmp_path / "bank"))
    tuned = MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1)
    with torch.no_grad():
        tuned.backbone.get_decoder().layers[3].self_attn.k_proj.weight += 0.01
    with pytest.raises(UserError, match="weights is .* there and .* here"):
        tuned.generate("kan", bank)
    with pytest.raises(UserError, match="from_pretrained"):
        MemLong(str(byte_backbone), memory_layer=1).read("kan")
    with pytest.raises(UserError, match="cannot be written"):
        bank.save("/proc/nowhere/bank")
    assert len(bank.entries(0)) == size


def test_a_checkpoint_and_its_run_folder_read_and_write(
    byte_backbone: Path, text_folder: Path, tmp_path: Path, book: str
) -> None:
    options = [*tiny(byte_backbone, text_folder, tmp_path), "--validate_first", "false", "--memory.top_k", "2"]
    assert main(["fit", *options, "--trainer.limit_val_batches", "0"]) == 0
    run = next((tmp_path / "memlong").iterdir())
    model = MemLong.from_pretrained(run)
    assert model.memory_layer == 1 and model.retrieval.config.top_k == 2 and model.retrieval.config.chunk_size == 16
    nested = run / "checkpoints" / "step=10" / "val" / "loss=1.2.ckpt"  # as Lightning names it by a metric with a slash
    nested.parent.mkdir(parents=True)
    nested.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    assert MemLong.from_pretrained(nested).retrieval.config.top_k == 2
    again = MemLong.from_pretrained(run / "checkpoints" / "last.ckpt", {"top_k": 1})
    assert again.retrieval.config.top_k == 1 and again.long_context.provenance() == model.long_context.provenance()
    untrained = MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1)
    assert untrained.long_context.provenance() != model.long_context.provenance(), (
        "what it reads with its tuned layers is its own"
    )
    assert main(["export", *options, "--ckpt_path", "last", "--output", str(tmp_path / "exported")]) == 0
    exported = MemLong.from_pretrained(tmp_path / "exported")
    assert (
        exported.long_context.provenance() == model.long_context.provenance() and exported.retrieval.config.top_k == 2
    )
    bank = model.read(book, window=64, progress=False)
    assert exported.generate("kan", bank, max_new_tokens=9) == model.generate("kan", bank, max_new_tokens=9)
