"""Writing with a cache and a memory, against the same model given all tokens beforehand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_memlong import attention
from lightning_memlong.bank import MemoryBank, Retrieved
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from lightning_memlong.errors import UserError
from lightning_memlong.generation import LocalContext
from lightning_memlong.memlong import MemLong
from tests.conftest import tiny_llama
from tests.parity.test_families import MODELS, build
from tests.reference import SlowWriter

CHUNK, WINDOW = 8, 32


class Numbers:
    """A tokenizer of numbers: token 17 is the word 17."""

    pad_token_id = bos_token_id = eos_token_id = 0
    chat_template = None
    all_special_ids = (0,)

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, list[Any]]:
        if isinstance(text, list):
            return {"input_ids": [self(each)["input_ids"] for each in text]}
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [self.decode(row) for row in rows]


def text(count: int, seed: int) -> list[int]:
    return torch.randint(3, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def model_of(
    backbone: Any, retriever: str = "hashing", top_k: int = 2, use: Any = "retrieved", **settings: Any
) -> MemLong:
    model = MemLong(backbone, **({"memory_layer": 1} | settings)).eval()
    config = MemoryConfig(chunk_size=CHUNK, capacity=256, top_k=top_k, use=use, retriever=RetrieverConfig(retriever))
    model.use_memory(config, Numbers())
    return model


def follow(model: MemLong, bank: MemoryBank, prompt: list[int], then: list[int]) -> tuple[list[Tensor], list[Any]]:
    """Logits after a prompt and after each token that follows, and what was retrieved for each."""
    context = LocalContext(model.long_context, bank, 0, WINDOW)
    context.retrieve_for_prompt(model.retrieval.retriever.encode([words(prompt)])[0])
    ids, logits, sets = list(prompt), [], []
    for token in [*then, 0]:
        logits.append(context.logits(torch.tensor([ids]))[0, 0])
        sets.append(context.retrieved)
        ids.append(token)
    return logits, sets


def stacked(sets: list[Retrieved]) -> Retrieved:
    return Retrieved(*(torch.cat([getattr(s, n) for s in sets], dim=-4 if n in ("keys", "values") else 0)
                       for n in ("keys", "values", "mask", "scores", "entries", "positions")),
                     begin=torch.cat([s.begin for s in sets]))  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}])
def test_without_memory_it_is_transformers_own(options: dict[str, Any]) -> None:
    prompt = text(11, 1)
    plain = tiny_llama()
    torch.manual_seed(3)
    expected = plain.generate(torch.tensor([prompt]), max_new_tokens=12, **options)[0, 11:].tolist()
    model = model_of(tiny_llama())
    torch.manual_seed(3)
    assert model.generate(words(prompt), window=WINDOW, max_new_tokens=12, **options) == words(expected)


def ends(lists: Any) -> dict[str, Any]:
    """A model's own settings: what it ends with, and nothing to pad with."""
    return {"eos_token_id": lists, "pad_token_id": None}


@pytest.mark.parametrize(
    "own, options",
    [
        (lambda free: ends([free[5], free[2]]), {"max_new_tokens": 12}),
        (lambda free: ends(free[3]), {"max_new_tokens": 12, "min_new_tokens": 6}),
        (lambda free: ends(None), {"max_new_tokens": 12}),
        (lambda free: ends(None), {"max_new_tokens": 12, "eos_token_id": 5}),
        (lambda free: {"max_length": 15}, {"max_new_tokens": 12}),
        (lambda free: {"max_length": 15}, {}),
        (lambda free: {}, {"max_length": 14}),
        (lambda free: ends([free[2]]), {"max_new_tokens": 9, "num_beams": 2}),
        (lambda free: ends([free[2]]), {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 3}),
    ],
)
def test_it_ends_where_transformers_does(own: Any, options: dict[str, Any]) -> None:
    prompt = torch.tensor([text(11, 1)])
    free = tiny_llama().generate(prompt, max_new_tokens=12, pad_token_id=0)[0, 11:].tolist()
    found = []
    for of_project in (False, True):
        backbone = tiny_llama()
        backbone.generation_config.update(**own(free))
        torch.manual_seed(3)
        if of_project:
            found.append(model_of(backbone).generate(words(prompt[0].tolist()), window=WINDOW, **options))
        else:
            written = backbone.generate(prompt, **options)[:, 11:].tolist()
            found.append([words(row) for row in written] if len(written) > 1 else words(written[0]))
    assert found[0] == found[1]


LLAMAS: list[dict[str, Any]] = [{"source": "single"}, {"fusion": "gated"}, {"bos": 2}, {"position": "zero"},
                                {"position": "fixed"},
                                {"attention": "sdpa"}, {"attention": "flex"}]  # fmt: skip


@pytest.mark.parametrize("family, settings", [*((f, {}) for f in MODELS), *(("Llama", s) for s in LLAMAS)])
def test_each_token_is_as_if_all_were_known(family: str, settings: dict[str, Any]) -> None:
    model = model_of(build(family), **settings)
    for gate in model.gates.values():
        gate.data.fill_(0.5)
    bank = model.read(words(text(98, 2)), window=24, progress=False)  # its last chunk is short: some tokens are masked
    ids = text(30, 3)
    logits, sets = follow(model, bank, ids[:11], ids[11:])
    padded = torch.nn.functional.pad(torch.tensor([ids]), (0, 2))
    # The prompt's chunks and the one that is begun with it share a set; later chunks have sets of their own.
    groups = [sets[0], sets[0], sets[16 - 10], sets[24 - 10]]
    assert len({tuple(s.positions.flatten().tolist()) for s in groups}) > 1
    with torch.no_grad():
        whole, plain = (model(padded, memory=m).logits[0, 10:30] for m in (stacked(groups), None))
    torch.testing.assert_close(torch.stack(logits), whole, atol=2e-4, rtol=1e-3)
    assert (whole - plain).abs().max() > 1e-2, "memory matters here"


@pytest.mark.parametrize("bos", [None, 2])
def test_text_that_leaves_the_window_goes_on_as_in_a_slow_writer(bos: int | None) -> None:
    model = model_of(tiny_llama(), bos=bos, memory_layer=1, retrieval_layers=[1, 3], position="sequential")
    bank = model.read(words(text(100, 2)), window=24, progress=False)
    before = {k: v.clone() for k, v in vars(bank.entries(0)).items() if k in ("positions", "lengths", "embeddings")}
    prompt, written = text(20, 3), text(70, 4)
    logits, sets = follow(model, bank, prompt, written)
    slow = SlowWriter(tiny_llama(), [1, 3])
    ids = ([] if bos is None else [bos]) + prompt + written
    first, moved = int(bos is not None), 0
    for place in range(len(ids) - 1):
        if place - first - moved == WINDOW:
            moved += WINDOW // 2
        local = [0, *range(first + moved, place + 1)] if moved or first else list(range(place + 1))
        got = sets[max(0, place - first - len(prompt) + 1)]
        real = got.mask[0]
        memory = {layer: (got.keys[i, 0][:, real], got.values[i, 0][:, real]) for i, layer in enumerate([1, 3])}
        with torch.no_grad():
            expected = slow.logits(
                torch.tensor(ids[: place + 1]), sorted(set(local)), None if place < first else memory
            )
        if (number := place - first - len(prompt) + 1) >= 0:
            torch.testing.assert_close(logits[number].double(), expected, atol=1e-3, rtol=1e-3)
    assert moved == 64, "the window was left several times"
    held = bank.entries(0)
    assert held.lengths[len(before["lengths"]) :].tolist() == [CHUNK - 1 + first] + [CHUNK] * 7
    layer = model.stored_layers.index(3)
    last = bank.gather(torch.tensor([[len(held.lengths) - 1]]), count=False)
    true = torch.stack([slow.kept[first + 56 + i][3][0] for i in range(CHUNK)], dim=1)
    torch.testing.assert_close(last.keys[layer, 0].double(), true, atol=1e-3, rtol=1e-3)
    kept = bank.row(0).tokens.tolist()
    assert kept[100:] == (prompt + written)[:64]


@pytest.mark.parametrize("family", MODELS)
def test_what_stays_is_turned_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalContext, "retrieve", lambda self, asking: None)  # what moves is told apart elsewhere
    backbone = build(family, max_position_embeddings=128)
    model, plain = model_of(backbone), build(family, max_position_embeddings=128)
    ids = torch.tensor([text(WINDOW + 4, 5)])
    context = LocalContext(model.long_context, model.retrieval.new_bank(1, 0), 0, WINDOW)
    context.retrieve_for_prompt(torch.zeros(256))
    found = torch.stack([context.logits(ids[:, : WINDOW + n])[0, 0] for n in range(5)])
    assert context.moved == WINDOW // 2
    # A copy of the first token stands where it has moved to; new tokens see it, and the half that stayed.
    half = WINDOW // 2
    order = torch.cat([ids[:, :WINDOW], ids[:, :1], ids[:, WINDOW:]], dim=1)
    places = torch.cat([torch.arange(WINDOW), torch.tensor([half - 1]), torch.arange(WINDOW, WINDOW + 4)])[None]
    seen = torch.ones(WINDOW + 5, WINDOW + 5, dtype=torch.bool).tril()
    seen[WINDOW] = False
    seen[WINDOW, WINDOW] = True
    seen[WINDOW + 1 :, :half] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    types = set(getattr(plain.config, "layer_types", None) or [])
    masks = {t: mask for t in types} if family.startswith("Gemma") else mask
    with torch.no_grad():
        whole = plain(order, position_ids=places, attention_mask=masks, use_cache=False).logits[0]
    torch.testing.assert_close(found, whole[[WINDOW - 1, *range(WINDOW + 1, WINDOW + 5)]], atol=5e-4, rtol=1e-3)


def test_beams_read_what_each_of_them_retrieves() -> None:
    model = model_of(tiny_llama())
    bank = model.read(words(text(100, 2)), window=24, progress=False)
    prompt = text(6, 3)
    found = model.generate(words(prompt), memory=bank, window=WINDOW, max_new_tokens=20, num_beams=3, min_new_tokens=20,
                           return_dict_in_generate=True, output_scores=True)  # fmt: skip
    ids = found.sequences
    context = LocalContext(model.long_context, bank, 0, WINDOW)
    context.retrieve_for_prompt(model.retrieval.retriever.encode([words(prompt)])[0])
    total = 0.0
    for place in range(6, 26):
        scores = context.logits(ids[:, :place]).log_softmax(-1)[0, 0]
        total += float(scores[ids[0, place]])
    assert float(found.sequences_scores[0]) == pytest.approx(total / 20, rel=1e-3)


def test_transformers_loop_writes_the_likeliest_token_each_time() -> None:
    model = model_of(tiny_llama())
    bank = model.read(words(text(100, 2)), window=24, progress=False)
    prompt = text(20, 3)
    found = model.generate(words(prompt), memory=bank, window=WINDOW, max_new_tokens=60, min_new_tokens=60)
    written = [int(word) for word in found.split()]
    logits, _ = follow(model, bank, prompt, written)
    assert [int(scores[1:].argmax()) + 1 for scores in logits[:60]] == written, "0 ends a text, and must not yet"


def test_another_beginning_is_read_from_the_start_while_it_is_there() -> None:
    model = model_of(tiny_llama())
    context = LocalContext(model.long_context, model.retrieval.new_bank(1, 0), 0, WINDOW)
    one, other = text(20, 1), text(12, 2)
    context.logits(torch.tensor([one]))
    found = context.logits(torch.tensor([other]))[0, 0]
    torch.testing.assert_close(found, model(torch.tensor([other])).logits[0, -1], atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match="nothing follows"):
        context.logits(torch.tensor([other]))
    context.logits(torch.tensor([other + text(40, 3)]))
    with pytest.raises(UserError, match="does not go on"):
        context.logits(torch.tensor([one]))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_each_set_counts_once_by_the_attention_of_the_tokens_that_read_it(options: dict[str, Any]) -> None:
    """As many windows' worth as retrievals would count, however many tokens read a set; but in other shares."""
    length = {"max_new_tokens": 20, "min_new_tokens": 20, "window": WINDOW}
    counted = {}
    for use in ("retrieved", "attention"):
        model = model_of(tiny_llama(), use=use)
        bank = model.read(words(text(100, 2)), window=24, progress=False)
        torch.manual_seed(0)
        written = model.generate(words(text(6, 3)), memory=bank, **length, **options)
        counted[use] = written, bank.entries(0).counters.clone()
        torch.manual_seed(0)
        model.generate(words(text(6, 4)), memory=bank, **length, **options)
        assert bank.entries(0).counters.sum() == pytest.approx(2 * float(counted[use][1].sum()))
    assert counted["retrieved"][0] == counted["attention"][0], "it changes no word"
    one, other = counted["retrieved"][1], counted["attention"][1]
    assert float(other.sum()) == pytest.approx(float(one.sum())) and one.sum() > 2
    assert not torch.equal(one, other) and bool((one[other > 0] > 0).all()), "sets of beams that were left do not count"


def test_what_a_set_counts_is_the_mean_over_all_tokens_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.use, "EVERY", 1)
    model = model_of(tiny_llama(), use="attention")
    bank = model.read(words(text(96, 2)), window=24, progress=False)
    prompt, written = text(11, 3), text(4, 4)
    _, sets = follow(model, bank, prompt, written)
    context = LocalContext(model.long_context, bank, 0, WINDOW)
    context.retrieve_for_prompt(model.retrieval.retriever.encode([words(prompt)])[0])
    for end in range(11, 16):
        context.logits(torch.tensor([(prompt + written)[:end]]))
    before = bank.entries(0).counters.clone()
    context.count_use()
    found = (bank.entries(0).counters - before)[sets[0].entries[0]]
    with torch.no_grad():
        whole = model(torch.tensor([prompt + written]), memory=sets[0]).chunk_use
    assert sets[0].count_attention and whole is not None
    torch.testing.assert_close(found, (2 * whole / whole.sum())[0].double(), atol=1e-4, rtol=1e-3)
