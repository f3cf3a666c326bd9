"""Joint attention as one masked call of PyTorch's own attention: for any device, dtype and dropout.

Legend: B rows, G groups, H query heads, H_kv key/value heads, T local tokens, S local keys, M retrieved tokens, D head
size.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.attention.inputs import Memo, RetrievedKV, Scores

LEAST = -30_000.0
"""Stands for a bias of minus infinity, which times the zeros of local keys would be no number; fits into float16."""


def joint_mask(
    memory_mask: Tensor, tokens: int, local_mask: Tensor | None = None, prefix: int = 0, keys: int | None = None
) -> Tensor:
    """Boolean mask (B, 1, T, G * M + S): a query sees the real retrieved tokens of its group, then local ones causally.

    Args:
        memory_mask: (B, G, M), true where a retrieved token is real.
        tokens: T.
        local_mask: (B or 1, 1, T, S) boolean or additive mask to use instead of the plain causal one.
        prefix: Local tokens at the beginning that see no memory.
        keys: S, local keys, of which the queries are the last; None: T.
    """
    rows, groups, remembered = memory_mask.shape
    if local_mask is None:
        keys = tokens if keys is None else keys
        local = torch.ones(tokens, keys, dtype=torch.bool, device=memory_mask.device).tril(keys - tokens)[None, None]
    else:
        local = local_mask if local_mask.dtype == torch.bool else local_mask == 0
    own = torch.eye(groups, dtype=torch.bool, device=memory_mask.device)
    seen = (own[None, :, :, None] & memory_mask[:, None]).flatten(2)  # (B, G, G * M)
    seen = F.pad(seen.repeat_interleave((tokens - prefix) // groups, dim=1)[:, None], (0, 0, prefix, 0))
    return torch.cat([seen, local.expand(rows, 1, tokens, local.shape[-1])], dim=-1)


def sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scores: Scores) -> Tensor:
    """PyTorch's attention; ``keys``, ``values`` may have fewer heads."""
    if query.is_cuda and mask is not None and query.shape[1] != keys.shape[1]:
        # A mask together with enable_gqa leaves CUDA's fused kernels for the slow one.
        group = query.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal,
        scale=scores.scale,
        dropout_p=scores.dropout,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _apart(query: Tensor, far_query: Tensor, plain: list[Tensor], far: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Dimensions of their own for keys read with one query and keys read with another: a query is [local | far]."""
    size = query.shape[-1]
    both = torch.cat([query, far_query], dim=-1)
    return both, [F.pad(keys, (0, size)) for keys in plain], F.pad(far, (size, 0))


def side_by_side(memory: RetrievedKV, query: Tensor) -> RetrievedKV:
    """Far and near memory as one, each with dimensions of its own.

    Args:
        memory: Far and near.
        query: (B, H, T, D), that of the local part.
    """
    near = memory.near
    assert near is not None
    asking = query[:, :, memory.prefix :]
    both, (close,), far = _apart(asking, memory.reading(query), [near.keys], memory.keys)
    keys, values = torch.cat([far, close], dim=2), torch.cat([memory.values, near.values], dim=2)
    mask = torch.cat([memory.real(), near.real()], dim=1)
    return replace(memory, keys=keys, values=values, mask=mask, query=both, near=None)


def _of_tokens(memory: RetrievedKV, scores: Scores, rows: int, tokens: int) -> Tensor:
    """Each token's and head's bias (B, H, T), as a factor of a key that is 1."""
    assert memory.bias is not None
    own = memory.bias.clamp(min=LEAST * scores.scale) / scores.scale
    groups = len(memory.keys) // rows
    of_groups = own.expand(rows * groups, -1).unflatten(0, (rows, groups)).transpose(1, 2)
    return F.pad(of_groups.repeat_interleave((tokens - memory.prefix) // groups, dim=2), (memory.prefix, 0))


def attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: RetrievedKV,
    local_mask: Tensor | None,
    scores: Scores,
    memo: Memo,
) -> Tensor:
    """Output (B, H, T, D) of one softmax over [memory | local].

    One call has one query. Where memory is read with another, or with a bias, both parts get dimensions of their own:
    a query is [local | memory | bias], a local key [key | 0 | 0], a retrieved one [0 | key | 1]. Near memory is read
    as local keys are.
    """
    rows, tokens = len(query), query.shape[2]
    parts = [memory] if memory.near is None else [memory, memory.near]

    def mask() -> Tensor:
        real = torch.cat([part.real() for part in parts], dim=1)
        return joint_mask(real.unflatten(0, (rows, -1)), tokens, local_mask, memory.prefix, key.shape[2])

    plain = [key, *(part.keys for part in parts[1:])]
    remembered = memory.keys
    if memory.query is not None:
        far_query = F.pad(memory.query, (0, 0, memory.prefix, 0))
        query, plain, remembered = _apart(query, far_query, plain, remembered)
    if memory.bias is not None:
        query = torch.cat([query, _of_tokens(memory, scores, rows, tokens).to(query.dtype)[..., None]], dim=-1)
        query = F.pad(query, (0, 7))  # fused kernels take multiples of 8
        plain = [F.pad(keys, (0, 8)) for keys in plain]
        remembered = F.pad(F.pad(remembered, (0, 1), value=1.0), (0, 7))

    def joined(local: Tensor, retrieved: list[Tensor]) -> Tensor:
        together = torch.cat(retrieved, dim=2).unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)
        return torch.cat([together, local], dim=2)

    keys, values = joined(plain[0], [remembered, *plain[1:]]), joined(value, [part.values for part in parts])
    return sdpa(query, keys, values, memo("joint", local_mask, mask), False, scores)
