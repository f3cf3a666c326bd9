"""What is looked at is what the model computes: losses, chunks, attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_memlong import MemLong, MemoryBank, UserError
from lightning_memlong.attention import Readers
from lightning_memlong.look import Looker, Question
from lightning_memlong.model import watching
from lightning_memlong.retrieval import retrieve_for
from lightning_memlong.text import Windows, WindowSpec

CHUNK, WINDOW, CONTEXT = 16, 64, 192
SETTINGS: dict[str, Any] = {"chunk_size": CHUNK, "capacity": 256, "top_k": 3, "retriever": {"name": "hashing"}}
START, END = 700, 722


def written(model: MemLong, text_folder: Path) -> Looker:
    text = " ".join(f.read_text() for f in sorted(text_folder.glob("*.txt")))[:1000]
    return Looker(model, model.read(text, window=WINDOW, progress=False), CONTEXT)


@pytest.fixture(scope="module")
def looker(byte_backbone: Path, text_folder: Path) -> Looker:
    return written(MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1), text_folder)


def losses(looker: Looker, memory: Any) -> torch.Tensor:
    """Of the tokens between START and END, the plain way."""
    ids = torch.tensor([looker.book.ids(END - CONTEXT, END)])
    with torch.no_grad():
        logits = looker.model(ids, memory=memory).logits[0]
    return F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[-(END - START) :]


def test_gains_are_the_losses_of_two_passes(looker: Looker) -> None:
    sight = looker.look(START, END)
    memory = looker.retrieve(START, END - CONTEXT)
    torch.testing.assert_close(sight.on, losses(looker, memory))
    torch.testing.assert_close(sight.off, losses(looker, None))
    torch.testing.assert_close(sight.gains, losses(looker, None) - losses(looker, memory))
    assert "".join(sight.pieces) == looker.book.text(START, END) and float(sight.gains.abs().max()) > 1e-3


def test_a_sentence_retrieves_what_its_window_would(looker: Looker) -> None:
    """The end of a window, from a place on, scored as an overlapping window's is."""
    begin = END - CONTEXT
    tokens = looker.memory.row(0).tokens.numpy()[begin:END]
    batch = Windows(CONTEXT, END - START, 1).batch([WindowSpec(0, begin, tokens)])
    expected = looker.model.retrieval.retrieve(looker.memory, batch, count=False)
    found = looker.retrieve(START, begin)
    assert found is not None and expected is not None
    assert torch.equal(found.entries, expected.entries) and torch.equal(found.scores, expected.scores)
    assert found.begin is not None and found.begin.tolist() == [begin]
    chunks = looker.look(START, END).chunks
    assert [c.start for c in chunks] == expected.positions[0].tolist()
    assert [c.similarity for c in chunks] == expected.scores[0].tolist()
    assert all(c.end <= begin and c.text == looker.book.text(c.start, c.end) for c in chunks)


def test_looking_changes_nothing(looker: Looker) -> None:
    before = looker.memory.entries(0).counters.clone()
    first, again = looker.look(START, END), looker.look(START, END)
    assert torch.equal(first.on, again.on) and torch.equal(first.attention, again.attention)
    assert torch.equal(looker.memory.entries(0).counters, before)
    assert looker.model.contexts.watch is None


@pytest.mark.parametrize("way", [{}, {"position": "zero"}, {"attention": "sdpa"}], ids=str)
def test_attention_sums_to_what_the_model_says(byte_backbone: Path, text_folder: Path, way: dict[str, Any]) -> None:
    looker = written(MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1, **way), text_folder)
    ids = torch.tensor([looker.book.ids(END - CONTEXT, END)])
    memory = looker.retrieve(START, END - CONTEXT)
    with torch.no_grad(), watching(looker.model, CONTEXT) as watch:
        output = looker.model(ids, memory=memory)
    ((shares,),) = [one.passes for one in watch.sets]
    assert sorted(shares) == looker.model.retrieval_layers
    assert bool(output.attention_mass) is ("attention" not in way), "the masked kernel does not tell it"
    for layer, mass in output.attention_mass.items():
        assert shares[layer].shape == (1, 4, CONTEXT, 3)
        torch.testing.assert_close(shares[layer].sum(-1).mean(-1), mass)
    sight = looker.look(START, END)
    whole = torch.stack([shares[layer][0] for layer in sight.layers])[:, :, -(END - START) - 1 : -1]
    torch.testing.assert_close(sight.attention, whole)
    torch.testing.assert_close(sight.share().sum(), whole.sum(-1).mean())
    heads = torch.stack([*sight.by_head().values()])
    each = sum(torch.stack([*sight.by_head(chunk).values()]) for chunk in range(3))
    torch.testing.assert_close(heads, each)
    torch.testing.assert_close(heads, whole.sum(-1).mean(2))
    torch.testing.assert_close(sight.by_token().sum(0), whole.sum(-1).mean((0, 1)))


def test_the_last_tokens_of_each_group_are_watched() -> None:
    readers = Readers(4, 3, torch.tensor([8, 5]), last=3)
    places, there = readers.sample(2, 8, 2, torch.device("cpu"))
    assert places.tolist() == [[1, 2, 3, 5, 6, 7], [1, 2, 3, 4, 4, 4]] and there.tolist() == [True] * 4
    few = Readers(4, 3, last=9).sample(1, 4, 1, torch.device("cpu"))[0]
    assert few.tolist() == [[0, 1, 2, 3]], "there are no more"


def test_gated_memory_is_not_attended_to_while_gates_are_shut(byte_backbone: Path, text_folder: Path) -> None:
    model = MemLong.from_pretrained(byte_backbone, SETTINGS, memory_layer=1, fusion="gated")
    sight = written(model, text_folder).look(START, END)
    assert len(sight.chunks) == 3 and not sight.attention.any() and not sight.gains.any()


def test_at_the_beginning_nothing_is_retrieved(looker: Looker) -> None:
    sight = looker.look(0, 20)
    assert not sight.chunks and not sight.gains.any() and sight.on[0] == 0 and len(sight.on) == 20
    assert sight.by_head() == {} and not sight.share().numel() and sight.by_token().shape == (0, 20)


def test_what_cannot_be_looked_at_is_refused(looker: Looker, byte_backbone: Path) -> None:
    for start, end in ((0, 0), (990, 1010), (100, 100 + CONTEXT)):
        with pytest.raises(UserError, match="sentence="):
            looker.look(start, end)
    with pytest.raises(UserError, match="context=5 "):
        Looker(looker.model, looker.memory, 5)
    bank = MemoryBank(1, 256, CHUNK)
    with pytest.raises(UserError, match="without text"):
        Looker(looker.model, bank)
    other = MemLong.from_pretrained(byte_backbone, {**SETTINGS, "retriever": {"name": "bm25"}}, memory_layer=1)
    with pytest.raises(UserError, match="retriever is 'hashing' there and 'bm25' here"):
        Looker(other, looker.memory)


def test_an_answer_is_the_one_that_generate_gives(looker: Looker) -> None:
    options = {"max_new_tokens": 40}  # more than two chunks: they retrieve anew
    question = Question(looker, "kan lor mis", WINDOW, options)
    assert not question.so_far().pieces
    written = question.answer()
    memory = looker.model.read(looker.book.text(0, len(looker.book)), window=WINDOW, progress=False)
    assert written.text == looker.model.generate("kan lor mis", memory, window=WINDOW, **options)
    assert written.attention.shape == (len(written.layers), 4, 40, len(written.chunks))
    assert len(written.pieces) == 40 and int(looker.memory.ends()[0]) == len(looker.book), "the bank is as it was"
    bank, asking = looker.memory.view(0), looker.model.long_context.embed_texts(["kan lor mis"])
    first = retrieve_for(looker.model.retrieval, bank, [asking])
    assert first is not None
    read = [chunk.start for chunk, share in zip(written.chunks, written.by_token()[:, 0], strict=True) if share > 0]
    assert read == first.positions[0].tolist(), "the first token reads what the question retrieved"
    assert len(written.chunks) > 3 and (written.by_token()[:, -1] > 0).sum() == 3


def test_special_tokens_say_nothing(looker: Looker) -> None:
    question, tokenizer = Question(looker, "kan", WINDOW, {}), looker.model.retrieval.tokenizer
    question._tokens.ids = [*tokenizer("ab")["input_ids"], tokenizer.pad_token_id, *tokenizer("c")["input_ids"]]
    written = question.so_far()
    assert written.pieces == ["a", "b", "", "c"] and written.text == "abc"
    assert not written.chunks and written.by_token().shape == (0, 4)


def test_an_answer_can_be_stopped(looker: Looker) -> None:
    question = Question(looker, "kan lor mis", WINDOW, {"max_new_tokens": 40})
    question.stop()
    assert len(question.answer().pieces) == 1
    with pytest.raises(UserError, match="prompt="):
        Question(looker, "kan " * 100, WINDOW, {}).answer()
    assert not looker.lock.locked() and looker.model.contexts.watch is None
