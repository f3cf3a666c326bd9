"""A MemLong as lm-eval asks models: requests in, log-likelihoods and texts out."""

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.bank import MemoryBank
from lightning_memlong.config import MemoryConfig, RetrieverConfig, require
from lightning_memlong.errors import UserError
from lightning_memlong.generation import Conversation, LocalContext, first_of_all
from lightning_memlong.memlong import MemLong
from lightning_memlong.text import tokenise

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise UserError(
        "lm-eval is not installed. Allowed: version 0.4.9 or newer. Fix: pip install -e '.[lm_eval]'."
    ) from error


log = logging.getLogger(__name__)


@register_model("memlong")
class MemLongLM(TemplateLM):
    """A MemLong for lm-eval.

    Args:
        pretrained: A checkpoint, run folder, exported folder or backbone, see :meth:`MemLong.from_pretrained`.
        window: Tokens of the local context [tokens]; None: see :meth:`MemLong.window`.
        max_gen_toks: Longest answer of tasks that do not say [tokens].
        device: Where it computes.
        batch_size: 1: requests are read one after the other.
        max_batch_size: Likewise.
        **options: Settings of the memory (``top_k=3``, ``chunk_size=128``; ``retriever`` is the encoder's name) and of
            the model (``memory_layer=11``, ``source=single``) by their names.

    Raises:
        UserError: If it cannot be loaded, or an option is unknown.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        window: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        allowed = "a checkpoint, run folder, exported folder or backbone"
        require(pretrained is not None, "pretrained", None, allowed, "give --model_args pretrained=smollm2-135m")
        allowed = "1: requests are read one after the other"
        require(batch_size in (None, 1, "1", "auto"), "batch_size", batch_size, allowed, "leave it out")
        require(max_batch_size in (None, 1), "max_batch_size", max_batch_size, allowed, "leave it out")
        memory = {k: options.pop(k) for k in list(options) if k in MemoryConfig.__dataclass_fields__}
        if isinstance(memory.get("retriever"), str):
            memory["retriever"] = RetrieverConfig(memory["retriever"])
        model = MemLong.from_pretrained(str(pretrained), memory, **options)
        self._device = torch.device(device or "cuda")
        if self._device.type == "cuda" and not torch.cuda.is_available():  # lm-eval's default, wherever it runs
            log.info("no CUDA device: computing on the CPU")
            self._device = torch.device("cpu")
        self.model, self.tokenizer = model.to(self._device), model.retrieval.tokenizer
        self.window, self.max_gen_toks = model.long_context.window(window), int(max_gen_toks)
        self.last_read: tuple[np.ndarray, MemoryBank] | None = None

    # ---- what lm-eval asks a model ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token a text ends with."""
        return int(self.tokenizer.eos_token_id)

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
        """Messages as the backbone's template writes them."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        scores = []
        for (context, continuation), before, scored in tqdm(requests, desc="memlong", disable=disable_tqdm):
            require(
                len(scored) < self.window,
                "continuation",
                f"{len(scored)} tokens",
                f"less than {self.window}",
                "raise window",
            )
            with self._behind(before, self.window - len(scored)) as (bank, local):
                with Conversation(self.model.long_context, bank, window=self.window) as conversation:
                    losses, likeliest = self._score(conversation.context, local, scored)
            scores.append((-float(losses.sum()), bool(likeliest.all())))
            self.cache_hook.add_partial("loglikelihood", (context, continuation), scores[-1])
        return scores

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
                total -= float(_losses(before, piece)[0].sum())
                last = logits[:, -1:]
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to one of the stop texts."""
        found = []
        for request in tqdm(requests, desc="memlong", disable=disable_tqdm):
            context, given = request.args
            options = dict(given)
            stops = options.pop("until", None) or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            options["max_new_tokens"] = int(options.pop("max_gen_toks", self.max_gen_toks))
            if stops:
                options["stop_strings"] = stops
            # Greedy unless a task asks for sampling, whatever the backbone's own settings are.
            if not float(options.get("temperature") or 0.0):
                options = {**options, "do_sample": False}
                options.pop("temperature", None)
            with self._behind(self.tok_encode(context), self.window) as (bank, local):
                local = local or [self.prefix_token_id]
                with Conversation(self.model.long_context, bank, window=self.window) as conversation:
                    ids = conversation.generate_from_tokens(local, self.question_in(local), **options)
            text = self.tokenizer.decode(ids[0, len(local) :], skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop)[0]
            found.append(text)
            self.cache_hook.add_partial("generate_until", (context, given), text)
        return found

    # ---- the work -----------------------------------------------------------------------------------------

    @contextmanager
    def _behind(self, tokens: Sequence[int], room: int) -> Any:
        """A bank with the beginning of a context, and the rest of it, which fits the window.

        Many requests share a context: the bank of the last one is kept.
        """
        if list(tokens[:1]) == [self.model.bos]:
            tokens = tokens[1:]  # it stands there by itself
        least, size = max(0, len(tokens) - room), self.model.retrieval.config.chunk_size
        whole = -(-least // size) * size  # chunks are whole, if anything is left after them
        cut = whole if whole < len(tokens) else least
        if cut == 0:
            yield None, list(tokens)
            return
        beginning = np.asarray(tokens[:cut], dtype=np.int64)
        if self.last_read is None or not np.array_equal(self.last_read[0], beginning):
            self.last_read = None  # its memory is free before the next one is filled
            self.last_read = beginning, self.model.read_tokens([beginning], window=self.window, progress=False)
        yield self.last_read[1], list(tokens[cut:])

    def question_in(self, local: Sequence[int]) -> str:
        """The end of the local tokens: what they retrieve with."""
        config = self.model.retrieval.config
        return str(self.tokenizer.decode(local[-config.query_chunks * config.chunk_size :]))

    def _score(self, context: LocalContext, local: Sequence[int], scored: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses (n,) of the scored tokens after the local ones, and whether each is the likeliest."""
        if not local:  # the model's own first token is all there is before them
            return _losses(context.logits(self._ids(scored), len(scored) + 1)[:, :-1], scored)
        context.retrieve_for_prompt(self.model.long_context.embed_texts([self.question_in(local)])[0])
        return _losses(context.logits(self._ids([*local, *scored[:-1]]), len(scored)), scored)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.device)


def _losses(logits: Tensor, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of logits (1, n, V) and the tokens that came: losses (n,) and whether each was the likeliest (n,)."""
    target = torch.tensor(wanted, device=logits.device)
    losses = torch.nn.functional.cross_entropy(logits[0].float(), target, reduction="none")
    return losses, logits[0].argmax(-1) == target
