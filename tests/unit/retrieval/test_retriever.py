"""Encoders: unit vectors, deterministic, and nothing cut silently."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_memlong.config import RetrieverConfig
from lightning_memlong.errors import UserError
from lightning_memlong.retrieval.bm25 import BM25Retriever
from lightning_memlong.retrieval.embedding_cache import CachedRetriever
from lightning_memlong.retrieval.hybrid import WORDS, HybridRetriever
from lightning_memlong.retrieval.retriever import HashingRetriever, load_retriever


def test_hashing_is_deterministic_and_finds_repeated_words() -> None:
    encoder = HashingRetriever(64)
    a, b, c, empty = encoder.encode(["the white whale", "whale the white", "a quiet village green", ""])
    assert torch.equal(a, b) and float(a @ c) < 0.5
    torch.testing.assert_close(torch.stack([a, c, empty]).norm(dim=1), torch.ones(3))


def test_unknown_encoder_is_told() -> None:
    with pytest.raises(UserError, match="memory.retriever.name='/nowhere'.*all-MiniLM-L6-v2"):
        load_retriever(RetrieverConfig(name="/nowhere"))


def test_hybrid_ranks_by_the_sum_of_standardised_scores() -> None:
    texts = ["the white whale", "a quiet village", "whale oil and whale bone", "white snow on the village", "the the"]
    meaning, words = HashingRetriever(16), BM25Retriever(512)
    hybrid = HybridRetriever(meaning, words)
    stored = hybrid.encode(texts)
    assert stored.shape == (5, hybrid.size) == (5, 16 + 512)
    asking = ["white whale", "village snow"]
    found = hybrid.as_query(hybrid.encode(asking), lambda: stored) @ stored.T
    for text, scores in zip(asking, found, strict=True):
        parts = []
        for part in (meaning, words):
            known = part.encode(texts)
            parts.append((known @ part.as_query(part.encode([text]), lambda known=known: known)[0]).double())
        expected = sum((p - p.mean()) / p.std(correction=0) for p in parts)
        assert isinstance(expected, torch.Tensor)
        assert not torch.equal(parts[0].argsort(), parts[1].argsort()), "the parts must not agree anyway"
        torch.testing.assert_close((scores - scores.mean()).double(), expected, atol=1e-5, rtol=1e-5)
        assert scores.argsort(descending=True).tolist() == expected.argsort(descending=True).tolist()


@pytest.mark.parametrize("known", [[], ["one chunk"], ["same words"] * 3])
def test_hybrid_makes_no_order_where_there_is_none(known: list[str]) -> None:
    hybrid = HybridRetriever(HashingRetriever(16), BM25Retriever(512))
    stored = hybrid.encode(known) if known else torch.empty(0, hybrid.size)
    queries = hybrid.as_query(hybrid.encode(["same words", ""]), lambda: stored)
    assert queries.shape == (2, hybrid.size) and (queries == 0).all()


def test_hybrid_by_name_is_the_packaged_encoder_and_words() -> None:
    hybrid = load_retriever(RetrieverConfig("hybrid", cache=False))
    packaged = load_retriever(RetrieverConfig(cache=False))
    texts = ["the white whale", "a quiet village"]
    expected = torch.cat([packaged.encode(texts), BM25Retriever(WORDS).encode(texts)], dim=1)
    torch.testing.assert_close(hybrid.encode(texts), expected)
    assert hybrid.size == expected.shape[1]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder: one-layer BERT, mean pooling, at most 12 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=12, **sizes)).save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=12)
    target = tmp_path_factory.mktemp("encoder")
    SentenceTransformer(modules=[transformer, Pooling(16)]).save(str(target))
    return target


def test_short_texts_are_encoded_as_they_are(tiny_encoder: Path) -> None:
    retriever = load_retriever(RetrieverConfig(name=str(tiny_encoder), cache=False))
    texts = ["a b c", "d e f g h"]
    expected = retriever._encoder.encode(texts, convert_to_tensor=True, normalize_embeddings=True)  # type: ignore[attr-defined]
    torch.testing.assert_close(retriever.encode(texts), expected)
    assert retriever.size == 16


def test_long_texts_are_encoded_in_pieces_and_averaged(tiny_encoder: Path) -> None:
    retriever = load_retriever(RetrieverConfig(name=str(tiny_encoder), cache=False))
    words = list("abcdefghijklmnopqrstuvwxy")
    pieces = retriever.split(" ".join(words))  # type: ignore[attr-defined]
    assert [piece.split() for piece, _ in pieces] == [words[:10], words[10:20], words[20:]]
    assert [tokens for _, tokens in pieces] == [10, 10, 5]
    parts = retriever.encode([piece for piece, _ in pieces])
    expected = torch.nn.functional.normalize(parts.T @ torch.tensor([10.0, 10.0, 5.0]), dim=0)
    whole, other = retriever.encode([" ".join(words), " ".join(words[:20]) + " a a a a a"])
    torch.testing.assert_close(whole, expected)
    assert (whole - other).abs().max() > 1e-4, "the end of the text must matter"


def test_a_prompt_takes_its_room(tiny_encoder: Path) -> None:
    """What stands before each piece is part of what the encoder takes: no piece loses its end."""
    letters = list("abcdefghijklmnopqrst")
    retriever = load_retriever(RetrieverConfig(name=str(tiny_encoder), prompt="x y z ", cache=False))
    pieces = retriever.split(" ".join(letters))  # type: ignore[attr-defined]
    assert [piece.split() for piece, _ in pieces] == [letters[:7], letters[7:14], letters[14:]]
    assert len(retriever.split("a b c d")) == 1  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="memory.retriever.prompt='10 tokens'.*leaves room for text in .* 12 tokens"):
        load_retriever(RetrieverConfig(name=str(tiny_encoder), prompt=" ".join(letters[:10])))


def test_the_default_type_of_others_changes_nothing(tiny_encoder: Path) -> None:
    """Lightning's bf16-true changes it for all threads while a step is made, and chunks are embedded meanwhile."""
    retriever = load_retriever(RetrieverConfig(name=str(tiny_encoder), cache=False))
    texts = ["a b c", " ".join("abcdefghijklmnopqrstuvwxy")]
    expected = retriever.encode(texts)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = retriever.encode(texts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_an_encoder_computes_in_the_type_that_is_asked_for(tiny_encoder: Path) -> None:
    plain, half = (load_retriever(RetrieverConfig(name=str(tiny_encoder), dtype=d)) for d in ("auto", "bfloat16"))
    assert isinstance(plain, CachedRetriever) and isinstance(half, CachedRetriever)
    assert next(half.retriever._encoder.parameters()).dtype == torch.bfloat16
    assert plain.path != half.path, "what one has encoded is not taken for the other's"
    exact, found = (r.retriever.encode(["a b c", "d e f g h " * 4]) for r in (plain, half))
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0.0)


# ---- the cache of embeddings ------------------------------------------------------------------------------


class Counting:
    """An encoder that counts what it is asked."""

    size = 8

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        return torch.stack([torch.full((8,), float(len(text))) for text in texts])


def test_nothing_is_encoded_twice(tmp_path: Path) -> None:
    encoder = Counting()
    cached = CachedRetriever(encoder, tmp_path / "e.sqlite")
    first = cached.encode(["a", "bb", "a"])
    assert first[:, 0].tolist() == [1, 2, 1] and encoder.asked == ["a", "bb"]
    other = CachedRetriever(encoder, tmp_path / "e.sqlite")
    assert torch.equal(other.encode(["bb", "ccc", "a"]), torch.tensor([2.0, 3, 1])[:, None].expand(3, 8))
    assert encoder.asked == ["a", "bb", "ccc"] and (other.hits, other.misses) == (2, 1)


def write_many(path: str, number: int) -> None:
    cached = CachedRetriever(Counting(), Path(path))
    for i in range(60):
        cached.encode([f"{(i * (number + 1)) % 40}" * 3, f"own {number} {i}"])


def test_many_may_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(str(tmp_path / "e.sqlite"), n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    encoder = Counting()
    everything = [f"own {n} {i}" for n in range(3) for i in range(60)]
    found = CachedRetriever(encoder, tmp_path / "e.sqlite").encode(everything)
    assert found[:, 0].tolist() == [len(text) for text in everything] and encoder.asked == []


def test_threads_may_share_a_cache(tmp_path: Path) -> None:
    cached = CachedRetriever(Counting(), tmp_path / "e.sqlite")
    expected = cached.encode(["a", "b"])
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(cached.encode, ["a", "b"]).result(), expected)
        other.submit(cached.encode, ["c"]).result()
    cached.encode(["c"])
    assert (cached.hits, cached.misses) == (3, 3)


def test_a_damaged_cache_is_told(tmp_path: Path) -> None:
    (tmp_path / "e.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="memory.retriever.cache.*e.sqlite cannot be used.*delete the file"):
        CachedRetriever(Counting(), tmp_path / "e.sqlite")


def test_the_cache_knows_one_encoder_from_another(tiny_encoder: Path, tmp_path: Path) -> None:
    plain = load_retriever(RetrieverConfig(name=str(tiny_encoder), cache=False))
    one, again, shorter = (
        load_retriever(RetrieverConfig(name=str(tiny_encoder), max_length=n)) for n in (None, None, 8)
    )
    assert one.path == again.path != shorter.path  # type: ignore[attr-defined]
    texts = ["a b c", "d e f g h"]
    for retriever in (one, again):
        torch.testing.assert_close(retriever.encode(texts), plain.encode(texts))
    assert again.misses == 0  # type: ignore[attr-defined]
