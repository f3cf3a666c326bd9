"""What a window or a text retrieves with, and the frozen encoders."""

from lightning_memlong.retrieval.chunks import Chunks
from lightning_memlong.retrieval.queries import Candidates, QueryBuilder, chunk_queries, search_any, window_queries
from lightning_memlong.retrieval.retrieval import Retrieval
from lightning_memlong.retrieval.retriever import Retriever, load_retriever, resolve_retriever
from lightning_memlong.retrieval.selection import CONTROL_SELECTIONS, SELECTORS, Request, load_selector, seed_of
from lightning_memlong.retrieval.text_queries import embed_texts, retrieve_for

__all__ = [
    "CONTROL_SELECTIONS",
    "SELECTORS",
    "Candidates",
    "Chunks",
    "QueryBuilder",
    "Request",
    "Retrieval",
    "Retriever",
    "chunk_queries",
    "embed_texts",
    "load_retriever",
    "load_selector",
    "resolve_retriever",
    "retrieve_for",
    "search_any",
    "seed_of",
    "window_queries",
]
