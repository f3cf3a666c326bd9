"""What is remembered of documents: keys and values, embeddings, counters, eviction (paper, section 2)."""

from lightning_memlong.bank.eviction import POLICIES, load_policy
from lightning_memlong.bank.memory_bank import MemoryBank
from lightning_memlong.bank.retrieved import JoinedRetrieved, Retrieved
from lightning_memlong.bank.row import BankRow, Entries
from lightning_memlong.bank.store import SPARE
from lightning_memlong.bank.transfer import Line, Transfer
from lightning_memlong.bank.view import BankView

__all__ = [
    "POLICIES",
    "SPARE",
    "BankRow",
    "BankView",
    "Entries",
    "JoinedRetrieved",
    "Line",
    "MemoryBank",
    "Retrieved",
    "Transfer",
    "load_policy",
]
