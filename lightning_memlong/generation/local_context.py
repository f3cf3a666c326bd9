"""The newest tokens of a text that grows: a local cache whose older half moves into the bank.

Legend: B sequences side by side (beams, or samples), T tokens, C tokens of a chunk, W tokens of the local context,
E embedding size.
"""

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.attention import Memo
from lightning_memlong.bank import BankView, Retrieved
from lightning_memlong.config import require
from lightning_memlong.errors import UserError
from lightning_memlong.generation.long_context import LongContext
from lightning_memlong.generation.sink_cache import SinkCache
from lightning_memlong.model import ForwardContext, decode
from lightning_memlong.retrieval import retrieve_for
from lightning_memlong.text import sent


class LocalContext:
    """The newest tokens of a text with their cache, and the memory behind them.

    What it gives are the logits the model gives when all tokens are known beforehand (teacher forcing): of a prompt
    with what its question retrieved, of each further chunk of tokens with what the chunks before it retrieve. When W
    tokens are in the cache, the older half of them moves into the bank; keys of the others are turned to the positions
    they then have, so that all distances among them stay as they were.

    Args:
        long_context: Whose.
        memory: What was read before; the text follows it.
        row: Which of its rows.
        window: W, a multiple of the chunk size.
    """

    def __init__(self, long_context: LongContext, memory: BankView, row: int, window: int) -> None:
        self._long_context, self._model, self._autocast = long_context, long_context.model, long_context.autocast
        self._memory, self._row, self.window = memory, row, window
        self._retrieval, self._chunk = long_context.retrieval, memory.chunk_size
        memory.row(row).release(None)  # what somebody left there who was never closed
        self.origin = int(memory.ends()[row])
        """Place of the text's first token, after what was read [tokens]."""
        self.moved = 0
        """Tokens of the text that are in the bank; whole chunks."""
        self.retrieved: Retrieved | None = None
        """What the newest tokens attend to."""
        self.ids = torch.empty(1, 0, dtype=torch.long, device=self._model.device)
        """(B, T), the text so far."""
        self.found: dict[int, tuple[int, float]] = {}
        """What was retrieved since the last question: where a chunk begins -> its length and best similarity."""
        self._cache = SinkCache(self._model)
        self._embedded: list[Tensor] = []  # of each chunk of the text (B, E)
        self._hidden: list[Tensor] = []  # states of the tokens of the unfinished chunk, for retriever hidden
        self._context = ForwardContext()
        self._use: Tensor | None = None  # (B, k) of what was retrieved, summed over tokens
        self._sets = 0  # how many sets were retrieved: all sequences may share one
        self._asked = False

    @property
    def _bank(self) -> BankView:
        """The row alone."""
        return self._memory.view(self._row)

    @property
    def _prefix(self) -> int:
        """Tokens of the cache before the local ones: the model's own first token, or the text's, once it has moved."""
        return int(self._model.bos is not None or self.moved > 0)

    @property
    def local(self) -> int:
        """Tokens in the local context."""
        return self.ids.shape[1] - self.moved

    def fork(self) -> "LocalContext":
        """The same text, to be gone on with in another way: its next tokens still attend to what a question retrieved.

        Forks share the bank, so each is to be closed before another goes on.
        """
        other = copy(self)
        other._cache, other.found = self._cache.copy(), dict(self.found)
        other._embedded, other._hidden, other._asked = list(self._embedded), list(self._hidden), True
        return other

    def close(self) -> None:
        """Take out of the bank what this text has moved into it."""
        self._memory.row(self._row).release(self)

    # ---- retrieval ----------------------------------------------------------------------------------------

    def retrieve_for_prompt(self, embedding: Tensor) -> None:
        """Let the tokens that come next attend to what a question (E,) retrieves.

        Raises:
            UserError: If what the text has moved into the bank is not there any more.
        """
        self._follow()
        self.found = {}
        self.retrieve([embedding[None]] * len(self.ids))
        self._asked = True

    def retrieve(self, asking: list[Tensor]) -> None:
        """Let the tokens that come next attend to what the chunks (n, E) of each sequence retrieve."""
        self.count_use()
        there = self._memory.insertions > 0
        self._sets = len(asking)
        self.retrieved = retrieve_for(self._retrieval, self._bank, asking, count=True) if there else None
        self._attach_memory()
        self._record_found()

    def count_use(self) -> None:
        """Let the bank know, with ``memory.use`` attention, how what was retrieved has been used since it was."""
        found, use, self._use = self.retrieved, self._use, None
        if found is not None and use is not None:
            if self._sets == 1:  # and several sequences have read it
                use = use.sum(0, keepdim=True)
            self._bank.count_use(found.entries[: len(use)], use, found.scores[: len(use)])

    def _note_use(self, tokens: int) -> None:
        """Add what the pass of so many tokens says."""
        if (use := self._context.chunk_use) is not None:
            self._use = tokens * use if self._use is None else self._use + tokens * use

    def _attach_memory(self) -> None:
        """Let the passes that come carry what was retrieved; it is rotated once."""
        self._context = ForwardContext(backend=self._model.layout.attention)
        if self.retrieved is not None:
            self.retrieved.begin = torch.full((len(self.retrieved.mask),), self.origin + self.moved)
        self._model.contexts.attach_memory(self._context, self.retrieved, self.window, self._model.device)

    def _record_found(self) -> None:
        """Keep where what was retrieved stands."""
        if (r := self.retrieved) is None:
            return
        lengths = r.mask.unflatten(1, (-1, self._chunk)).sum(-1)
        facts = [t.flatten().tolist() for t in (r.positions, lengths, r.scores)]
        for start, length, score in zip(*facts, strict=True):
            if start >= 0:
                self.found[start] = max(self.found.get(start, (length, score)), (length, score))

    def _retrieve_for_chunk(self) -> None:
        """Retrieve with the newest chunks of the text, for the chunk that begins now."""
        self._embed()
        newest = self._embedded[-self._retrieval.config.query_chunks :]
        self.retrieve(list(torch.stack(newest, dim=1)))

    def _embed(self) -> None:
        """Embed the whole chunks of the text that have not been."""
        first, count = len(self._embedded), self.ids.shape[1] // self._chunk
        if first == count:
            return
        begin, end = first * self._chunk, count * self._chunk
        hidden = None
        if self._retrieval.retriever.needs_hidden:
            states = torch.cat(self._hidden, dim=1)
            hidden, self._hidden = states[:, : end - begin], [states[:, end - begin :]]
        found = self._retrieval.embed_tokens(self.ids[:, begin:end], hidden=hidden)
        self._embedded += list(found.unbind(dim=1))

    # ---- going on -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, ids: Tensor, last: int = 1, goes_on: bool = False) -> Tensor:
        """Next-token logits (B, last, V) at the end of a text (B, T) that goes on from the one before.

        Args:
            ids: The whole text.
            last: At how many of its tokens, of those that are new.
            goes_on: Whether it is known to go on from the one before; comparing them waits for the device.

        Raises:
            UserError: If it is another text whose beginning is gone, or several sequences no longer fit the window.
        """
        if not goes_on:
            self._reorder_beams(ids)
        hidden: list[Tensor] = []
        while self.ids.shape[1] < ids.shape[1]:
            if self.local == self.window:
                self._evict_to_bank()
            here = self.ids.shape[1]
            if here and here % self._chunk == 0 and not self._asked:
                self._retrieve_for_chunk()
            # A question's tokens all attend to what it retrieved; others to a set for each chunk.
            most = ids.shape[1] - here if self._asked else self._chunk - here % self._chunk
            hidden.append(self._decode_step(ids[:, here : here + min(most, self.window - self.local)]))
        self._asked = False
        if not hidden:
            raise UserError("prompt: nothing follows the text so far. Allowed: at least one more token. Fix: add some.")
        with self._autocast():
            return self._model.head.logits(torch.cat(hidden, dim=1)[:, -last:])

    def _reorder_beams(self, ids: Tensor) -> None:
        """Put the sequences in the order of the new ones, which go on from them: beams are chosen anew at each step."""
        known = self.ids.shape[1]
        if known == 0:
            self.ids = ids[:, :0]
            if self.retrieved is not None and len(ids) > 1:  # asked before the number of sequences was known
                self._repeat_memory(torch.zeros(len(ids), dtype=torch.long))
            return
        same = (ids[:, None, :known] == self.ids[None, :, : ids.shape[1]]).all(dim=-1)
        if ids.shape[1] < known or not bool(same.any(dim=1).all()):
            self._reset(ids)
            return
        order = same.int().argmax(dim=1)
        if len(order) != len(self.ids) or not torch.equal(order, torch.arange(len(order), device=order.device)):
            self.ids = self.ids[order]
            self._cache.reorder(order)
            self._embedded = [e[order.cpu()] for e in self._embedded]
            self._hidden = [h[order] for h in self._hidden]
            self._repeat_memory(order)

    def _reset(self, ids: Tensor) -> None:
        """Read texts from their beginning: the best beam may be one that was left behind.

        Raises:
            UserError: If their beginning is not in the local context any more.
        """
        if self.moved:
            raise UserError("prompt: it does not go on from the text before. Fix: begin a new conversation.")
        self.ids, self._cache, self._embedded, self._hidden = ids[:, :0], SinkCache(self._model), [], []
        self._repeat_memory(torch.zeros(len(ids), dtype=torch.long))

    def _repeat_memory(self, order: Tensor) -> None:
        """Let sequences have what those of ``order`` (B,) retrieved."""
        if (r := self.retrieved) is None:
            return
        order = order.cpu()
        there = sent(order, r.mask.device)
        self.retrieved = Retrieved(
            r.keys.index_select(-4, there), r.values.index_select(-4, there), r.mask[there],
            r.scores[order], r.entries[order], r.positions[order], top_k=r.top_k,
            asked=r.asked, count_attention=r.count_attention,
        )  # fmt: skip
        self._use = None if self._use is None else self._use[there]
        self._attach_memory()

    def _decode_step(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, T, hidden size) of the next tokens, which the cache then holds."""
        model, first = self._model, self.ids.shape[1] == 0
        prefix = int(first and model.bos is not None)
        fed = F.pad(tokens, (1, 0), value=model.bos) if prefix else tokens
        context = self._context
        context.prefix, context.hidden, context.memo = prefix, None, Memo()  # masks are those of a pass
        context.layer_use = {}
        with self._autocast():
            hidden = decode(model.backbone, fed, context, self._cache.of_backbone)
        self._note_use(tokens.shape[1])
        self.ids = torch.cat([self.ids, tokens], dim=1)
        if self._retrieval.retriever.needs_hidden:
            assert context.hidden is not None
            self._hidden.append(context.hidden[:, prefix:])
        return hidden

    # ---- moving -------------------------------------------------------------------------------------------

    def _evict_to_bank(self) -> None:
        """Move the older half of the local context into the bank, and turn what stays to its new positions."""
        allowed = f"one sequence, once the text is longer than the window ({self.window} tokens)"
        fix = "lower max_new_tokens, raise window, or write them one at a time"
        require(len(self.ids) == 1, "num_beams, num_return_sequences", len(self.ids), allowed, fix)
        self._embed()
        half = self.window // self._chunk // 2 * self._chunk
        # The first token of all stays in the cache; if it is the text's own, its chunk is stored without it.
        kept = int(self._prefix == 0)
        self._insert_oldest(half, kept)
        self._cache.evict(self._prefix + half, self.window)
        self.moved += half
        self._attach_memory()  # the text begins elsewhere in the window now, and what lies near stands farther away

    def _insert_oldest(self, half: int, kept: int) -> None:
        """Store the oldest ``half`` local tokens, without the first ``kept`` of them."""
        size, begin = self._chunk, self._prefix
        keys, values = self._cache.unrotated_kv(begin + kept, begin + half)
        if kept:  # its chunk is that much shorter
            first = size - kept
            keys, values = (
                torch.cat([t[..., :first, :], 0 * t[..., :kept, :], t[..., first:, :]], dim=-2) for t in (keys, values)
            )
        first, count = self.moved // size, half // size
        embeddings = torch.stack(self._embedded[first : first + count], dim=1)
        lengths, starts = torch.full((1, count), size), self.moved + torch.arange(0, half, size)[None]
        lengths[0, 0] -= kept
        starts[0, 0] += kept
        self._memory.row(self._row).acquire(self)
        self._follow()
        self._memory.reserve(self._row, count)  # what was read is not to make way for what is said about it
        self._bank.insert(keys, values, embeddings, lengths, self.origin + starts, evict=False)
        self._bank.row(0).append_tokens(self.ids[0, self.moved : self.moved + half], self.origin + self.moved)

    def _follow(self) -> None:
        """Come after what the row holds: others may have read into it while nothing of the text was there."""
        end = int(self._memory.ends()[self._row])
        if not self.moved:
            self.origin = end
        known = self.origin + self.moved
        allowed = f"{known:,}, where this text goes on"
        require(end == known, "memory", f"a row that ends at token {end:,}", allowed, "begin a new conversation")
