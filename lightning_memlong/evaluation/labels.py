"""Label words: their tokens after a cue, and how likely a model finds them.

Legend: B texts asked at once, T tokens, E hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lightning_memlong.bank import Retrieved
from lightning_memlong.config import require
from lightning_memlong.evaluation.base import Subject
from lightning_memlong.evaluation.tasks import TASKS
from lightning_memlong.memlong import MemLong


def label_tokens(task: str, tokenizer: Any) -> list[list[int]]:
    """Tokens of each label word after the cue.

    Raises:
        UserError: If the tokenizer joins a word with the cue, does not know it, or makes one the beginning of another.
    """
    cue = TASKS[task].template.format("x")
    prompt: list[int] = tokenizer(cue, add_special_tokens=False)["input_ids"]
    found: list[list[int]] = []
    for word in TASKS[task].words:
        whole: list[int] = tokenizer(f"{cue} {word}", add_special_tokens=False)["input_ids"]
        tokens = whole[len(prompt) :]
        ok = whole[: len(prompt)] == prompt and bool(tokens) and tokenizer.unk_token_id not in tokens
        split = [tokenizer.decode(t) for t in whole[-len(tokens) - 1 :]]
        allowed = "words whose tokens begin after the cue, and that the tokenizer knows"
        require(ok, f"evaluation.tasks.{task}", f"{word} (split as {split})", allowed, "leave the task out")
        found.append(tokens)
    for i, one in enumerate(found):
        for j, other in enumerate(found):
            ok = i == j or other[: len(one)] != one
            words = f"{TASKS[task].words[i]}, {TASKS[task].words[j]}"
            allowed = "words none of which begins another, in tokens"
            require(ok, f"evaluation.tasks.{task}", words, allowed, "leave the task out")
    return found


@torch.no_grad()
def score_labels(
    subject: Subject, prompts: Sequence[str], labels: Sequence[Sequence[int]], memory: Retrieved | None
) -> Tensor:
    """Log-likelihood (B, labels), float32 on the CPU, of each label's tokens after each prompt.

    The prompts share one pass where every label is one token; else each label has a pass of its own.
    """
    ids = [subject.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    if all(len(tokens) == 1 for tokens in labels):
        log_p = _after(subject, ids, memory, 1)[:, 0]
        return log_p[:, torch.tensor([tokens[0] for tokens in labels])]
    columns = []
    for tokens in labels:
        log_p = _after(subject, [[*i, *tokens[:-1]] for i in ids], memory, len(tokens))
        columns.append(log_p[:, torch.arange(len(tokens)), torch.tensor(tokens)].sum(dim=1))
    return torch.stack(columns, dim=1)


def _after(subject: Subject, ids: Sequence[Sequence[int]], memory: Retrieved | None, count: int) -> Tensor:
    """Log-probabilities (B, count, V) at the last ``count`` places of each text, float32 on the CPU."""
    begun = 0 if memory is not None else _common(ids, count)
    rest = [i[begun:] for i in ids]
    longest = max(map(len, rest))
    padded = torch.tensor([[*i, *[0] * (longest - len(i))] for i in rest], device=subject.device)
    with subject.autocast():
        if begun:
            hidden = _continued(subject.model, ids[0][:begun], padded)
        else:
            hidden = subject.model(padded, memory=memory).hidden
        last = torch.tensor([len(i) - count for i in rest], device=hidden.device)[:, None]
        places = last + torch.arange(count, device=hidden.device)
        chosen = hidden[torch.arange(len(ids), device=hidden.device)[:, None], places]
        return subject.model.head.logits(chosen).float().log_softmax(dim=-1).cpu()


def _common(ids: Sequence[Sequence[int]], keep: int) -> int:
    """Tokens that all texts begin with, all but at least ``keep`` of each."""
    shortest = min(map(len, ids)) - keep
    return next((n for n in range(shortest) if len({i[n] for i in ids}) > 1), max(0, shortest))


def _continued(model: MemLong, begun: Sequence[int], rest: Tensor) -> Tensor:
    """Last hidden states (B, T, E) of texts that begin alike, which is read once: demonstrations are most of a prompt.

    Not with memory, which is another one for each text from the first token on.
    """
    decoder, cache = model.backbone.get_decoder(), DynamicCache(config=model.config)
    first = [*([] if model.bos is None else [model.bos]), *begun]
    decoder(input_ids=torch.tensor([first], device=rest.device), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rest))
    return decoder(input_ids=rest, past_key_values=cache, use_cache=True).last_hidden_state
