"""A MemLong as lm-eval asks models: requests in, log-likelihoods and texts out."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.backbone import load_tokenizer
from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import MemoryConfig, RetrieverConfig, require
from lightning_memlong.errors import UserError
from lightning_memlong.generation import Conversation, first_of_all
from lightning_memlong.lm_eval.answering import chat_text, cut_off, losses_of, prompted, writing_options
from lightning_memlong.memlong import MemLong, tokenizer_of
from lightning_memlong.model import decode
from lightning_memlong.text import tokenise

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm

    from lightning_memlong.lm_eval.lm_eval_private import require_tokens, tasks_with
except ImportError as error:
    raise UserError(
        "lm-eval is not installed. Allowed: version 0.4.13 or newer. Fix: pip install -e '.[lm_eval]'."
    ) from error


log = logging.getLogger(__name__)


@register_model("memlong")
class MemLongLM(TemplateLM):
    """A MemLong for lm-eval.

    Args:
        pretrained: A checkpoint, run folder, exported folder or backbone, see :meth:`MemLong.from_pretrained`.
        tokenizer: A name, folder or hub id, where it is not the one that comes with ``pretrained``; or a tokenizer.
        window: Tokens of the local context [tokens]; None: see :meth:`MemLong.window`.
        max_gen_toks: Longest answer of tasks that do not say [tokens].
        device: Where it computes.
        batch_size: How many contexts that fit the window are scored side by side; what is longer, and what is
            written, comes one after the other, as each has a memory of its own. ``auto``: ``max_batch_size``.
        max_batch_size: For ``auto``.
        **options: Settings of the memory (``top_k=3``, ``chunk_size=128``; ``retriever`` is the encoder's name) and of
            the model (``memory_layer=11``, ``source=single``) by their names.

    Raises:
        UserError: If it cannot be loaded, or an option is unknown.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        tokenizer: Any = None,
        window: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 8,
        **options: Any,
    ) -> None:
        super().__init__()
        allowed = "a checkpoint, run folder, exported folder or backbone"
        require(pretrained is not None, "pretrained", None, allowed, "give --model_args pretrained=smollm2-135m")
        self.batch_size = _as_batch_size(batch_size, max_batch_size)
        memory = {k: options.pop(k) for k in list(options) if k in MemoryConfig.__dataclass_fields__}
        if isinstance(memory.get("retriever"), str):
            memory["retriever"] = RetrieverConfig(memory["retriever"])
        model = MemLong.from_pretrained(str(pretrained), memory, **options)
        if tokenizer is not None:
            model.use_memory(model.long_context.config, _own_tokenizer(model, tokenizer))
        where = torch.device(device or "cuda")
        if where.type == "cuda" and not torch.cuda.is_available():  # lm-eval's default, wherever it runs
            log.info("no CUDA device: computing on the CPU")
            where = torch.device("cpu")
        self._take(model.to(where), window, max_gen_toks)

    @classmethod
    def around(
        cls, model: MemLong, window: int | None = None, max_gen_toks: int = 256, batch_size: int | str | None = 1
    ) -> "MemLongLM":
        """The same around a model that is loaded already, where it is.

        Args:
            model: Knows its tokenizer and memory settings.
            window: As for the class.
            max_gen_toks: Likewise.
            batch_size: Likewise.
        """
        adapter = cls.__new__(cls)
        TemplateLM.__init__(adapter)
        adapter.batch_size = _as_batch_size(batch_size, None)
        adapter._take(model, window, max_gen_toks)
        return adapter

    def _take(self, model: MemLong, window: int | None, max_gen_toks: int) -> None:
        self.model, self.tokenizer, self._device = model, model.long_context.tokenizer, model.device
        self.window, self.max_gen_toks = model.long_context.window(window), int(max_gen_toks)
        self.last_read: tuple[np.ndarray, MemoryBank] | None = None

    # ---- what lm-eval asks a model ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token a text ends with."""
        token, allowed = self.tokenizer.eos_token_id, "a backbone whose tokenizer names a last token"
        require(token is not None, "pretrained", self.model.name, allowed, "choose another")
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        """The token a text begins with."""
        token = first_of_all(self.model, self.tokenizer)
        allowed = "a backbone whose tokenizer names a first or a last token"
        require(token is not None, "pretrained", self.model.name, allowed, "choose another")
        return int(token)  # type: ignore[arg-type]

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; the model puts its own first token before them."""
        return tokenise(self.tokenizer, [string])[0].tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the backbone's template writes them.

        Raises:
            UserError: If it has none.
        """
        return chat_text(self.tokenizer, chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        for _, _, scored in requests:
            allowed, given = f"less than {self.window}", f"{len(scored)} tokens"
            require(len(scored) < self.window, "continuation", given, allowed, "raise window")
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="memlong", disable=disable_tqdm) as progress:
            for batch in self._batches([(before, scored) for _, before, scored in requests]):
                pairs = [(requests[n][1], requests[n][2]) for n in batch]
                scores = self._score_short(pairs) if self._is_short(*pairs[0]) else [self._score_long(*pairs[0])]
                for n, (losses, likeliest) in zip(batch, scores, strict=True):
                    found[n] = -float(losses.sum()), bool(likeliest.all())
                    self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
                progress.update(len(batch))
        return [found[n] for n in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: each token sees the newest ones, and what they retrieve of those before."""
        found = []
        for request in tqdm(requests, desc="memlong", disable=disable_tqdm):
            (text,) = request.args
            conversation = Conversation(self.model.long_context, window=self.window)
            total, tokens, size = 0.0, self.tok_encode(text), conversation.memory.chunk_size
            ids = [] if self.model.bos is not None else [self.prefix_token_id]
            last = conversation.context.logits(self._ids(ids)) if ids else None
            for start in range(0, len(tokens), size):
                piece = tokens[start : start + size]
                ids += piece
                logits = conversation.context.logits(self._ids(ids), len(piece) + (last is None))
                before = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], dim=1)
                total -= float(losses_of(before, piece)[0].sum())
                last = logits[:, -1:]
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to one of the stop texts."""
        found = []
        for request in tqdm(requests, desc="memlong", disable=disable_tqdm):
            context, given = request.args
            stops, options = writing_options(given, self.max_gen_toks)
            bank, local = self._behind(self.tok_encode(context), self.window)
            local = local or [self.prefix_token_id]
            with prompted(self.model.long_context, bank, local, self.question_in(local), self.window) as prompt:
                text = prompt.write(stops, **options)
            found.append(text)
            self.cache_hook.add_partial("generate_until", (context, given), text)
        return found

    # ---- the work -----------------------------------------------------------------------------------------

    def _is_short(self, before: Sequence[int], scored: Sequence[int]) -> bool:
        """Whether a context fits the window beside what is scored: it needs no memory."""
        return len(self._bare(before)) + len(scored) <= self.window

    def _bare(self, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens without the model's own first one, which stands there by itself."""
        return tokens[1:] if list(tokens[:1]) == [self.model.bos] else tokens

    def _batches(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
        """Which requests are scored together: short ones by length, as little is padded then; others one by one."""
        short = [n for n, pair in enumerate(pairs) if self._is_short(*pair)]
        short.sort(key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
        together = [short[n : n + self.batch_size] for n in range(0, len(short), self.batch_size)]
        return together + [[n] for n in range(len(pairs)) if n not in set(short)]

    @torch.no_grad()
    def _score_short(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[Tensor, Tensor]]:
        """Of requests without a memory, what :meth:`_score_long` gives of one."""
        first = [] if self.model.bos is None else [self.model.bos]
        texts = [[*first, *self._bare(before), *scored] for before, scored in pairs]
        longest = max(len(text) for text in texts)
        # What follows a text is seen by nothing before it.
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=self.model.device)
        context, losses = self.model.contexts.new_context(None, ids[:, len(first) :], self.model.bos), []
        with self.model.long_context.autocast():
            hidden = decode(self.model.backbone, ids, context)
            for row, (text, (_, scored)) in enumerate(zip(texts, pairs, strict=True)):
                asked = hidden[row : row + 1, len(text) - len(scored) - 1 : len(text) - 1]
                losses.append(losses_of(self.model.head.logits(asked), scored))
        return losses

    def _score_long(self, before: Sequence[int], scored: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses (n,) of the scored tokens, and whether each is the likeliest; what is before the window is read."""
        bank, local = self._behind(before, self.window - len(scored))
        with prompted(self.model.long_context, bank, local, self.question_in(local), self.window) as prompt:
            return prompt.score(scored)

    def _behind(self, tokens: Sequence[int], room: int) -> tuple[MemoryBank | None, list[int]]:
        """A bank with the beginning of a context, and the rest of it, which fits so much room.

        Many requests share a context: the bank of the last one is kept.
        """
        tokens = self._bare(tokens)
        cut = cut_off(len(tokens), room, self.model.retrieval.config.chunk_size)
        if cut == 0:
            return None, list(tokens)
        beginning = np.asarray(tokens[:cut], dtype=np.int64)
        if self.last_read is None or not np.array_equal(self.last_read[0], beginning):
            self.last_read = None  # its memory is free before the next one is filled
            self.last_read = beginning, self.model.read_tokens([beginning], window=self.window, progress=False)
        return self.last_read[1], list(tokens[cut:])

    def question_in(self, local: Sequence[int]) -> str:
        """The end of the local tokens: what they retrieve with."""
        config = self.model.retrieval.config
        return str(self.tokenizer.decode(local[-config.query_chunks * config.chunk_size :]))

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.device)


@cache
def tokenizer_named(name: str) -> Any:
    """The tokenizer of what :meth:`MemLong.from_pretrained` loads by this name.

    Raises:
        UserError: If it cannot be loaded, or makes no tokens of a text.
    """
    require(
        bool(name), "tokenizer", name, "a name, folder or hub id", "give --model_args pretrained=... or tokenizer=..."
    )
    return require_tokens(tokenizer_of(name), name)


def tasks_with_our_tokenizers() -> AbstractContextManager[None]:
    """For runs of lm-eval from Python, as its command line here has it: RULER's tasks know our models' tokenizers.

    ``with tasks_with_our_tokenizers(): lm_eval.simple_evaluate("memlong", "pretrained=smollm2-135m", ...)``
    """
    return tasks_with(tokenizer_named)


def _as_batch_size(given: int | str | None, most: int | None) -> int:
    """As lm-eval's own models take it."""
    value = (most or 1) if str(given).startswith("auto") else 1 if given is None else given
    ok = str(value).isdigit() and int(value) >= 1
    require(ok, "batch_size", given, "1 or more contexts, or auto", "correct it")
    return int(value)


def _own_tokenizer(model: MemLong, given: Any) -> Any:
    """A tokenizer whose tokens the model has embeddings for.

    Raises:
        UserError: If it cannot be loaded, or has more tokens than the model.
    """
    tokenizer = load_tokenizer(given) if isinstance(given, str) else given
    most = int(model.config.vocab_size)
    allowed = f"one of at most the {most} tokens of {model.name}"
    require(len(tokenizer) <= most, "tokenizer", f"{given}, {len(tokenizer)} tokens", allowed, "choose another")
    return tokenizer
