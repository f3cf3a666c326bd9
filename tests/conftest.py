"""Tiny models and texts, made on the spot: no network, no packaged weights."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.server import Server

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu", "ra", "si", "tu") for b in ("n", "r", "s", "th", "x", "")]


def tiny_config(**changes: object) -> LlamaConfig:
    """A Llama of four layers with grouped queries."""
    settings: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**(settings | changes))


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes)).eval()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four documents of 200 to 900 words."""
    return write_texts(tmp_path_factory.mktemp("text"))


def write_texts(folder: Path) -> Path:
    """The documents of ``text_folder``."""
    folder.mkdir(exist_ok=True)
    mixer = random.Random(0)
    for number in range(24):
        words = [mixer.choice(WORDS) for _ in range(mixer.randrange(200, 900))]
        (folder / f"document-{number:02d}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that loads as a model and as a tokenizer, like any Hugging Face checkpoint."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    tiny_llama(initializer_range=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer that knows every text: a token is a byte."""
    return write_byte_backbone(tmp_path_factory.mktemp("bytes"))


def write_byte_backbone(folder: Path) -> Path:
    """The model and the tokenizer of ``byte_backbone``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=257, special_tokens=["<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([""], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    tiny_llama(initializer_range=0.1, vocab_size=257, max_position_embeddings=4096).save_pretrained(folder)
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    """A web server on this machine."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token caches of tests stay out of the user's; the converted backbone is shared by slow tests on purpose."""
    monkeypatch.setenv("MEMLONG_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)
