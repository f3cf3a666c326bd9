"""What CUDA's attention kernels compute, in plain operations: arguments, results and layouts of the functions in aten.

Where a kernel reads memory by a layout of its own, whatever strides it is given, that layout is demanded.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memlong.attention import cuda_kernel


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = scale * query.float() @ key.float().transpose(2, 3)
    if causal:
        assert query.shape[2] == key.shape[2]
        scores = scores.masked_fill(~torch.ones(scores.shape[2:], device=scores.device).tril().bool(), -torch.inf)
    return scores if bias is None else scores + bias.float()


def _shared(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in tensors]


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scores: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (scores - lse[..., None]).exp()
    delta = (grad.float() * output.float()).sum(-1, keepdim=True)
    of_scores = weights * (grad.float() @ value.float().transpose(2, 3) - delta)
    of_key = of_scores.transpose(2, 3) @ query.float() * scale
    of_value = weights.transpose(2, 3) @ grad.float()
    return (of_scores @ key.float() * scale).to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, *, return_debug_mask: bool, scale: float
) -> tuple[Any, ...]:
    """``_scaled_dot_product_flash_attention``: few key heads, no mask."""
    assert query.shape[-1] % cuda_kernel.HEAD_ALIGNMENT == 0 and not return_debug_mask and dropout == 0.0
    keys, values = _shared(query, key, value)
    scores = _scores(query, keys, None, causal, scale)
    output = (scores.softmax(-1) @ values.float()).to(query.dtype)
    return _by_tokens(output), scores.logsumexp(-1), None, None, query.shape[2], key.shape[2], None, None, None


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, cum_q: None, cum_k: None,
    max_q: int, max_k: int, dropout: float, causal: bool, seed: Tensor, offset: Tensor, *, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``_scaled_dot_product_flash_attention_backward``."""
    assert (max_q, max_k) == (query.shape[2], key.shape[2]) and lse.shape == query.shape[:3] == grad.shape[:3]
    keys, values = _shared(query, key, value)
    scores = _scores(query, keys, None, causal, scale)
    q, k, v = _gradients(grad, query, keys, values, output, lse, scores, scale)
    k, v = (t.unflatten(1, (key.shape[1], -1)).sum(2) for t in (k, v))
    return q, k, v


def _by_tokens(tensor: Tensor) -> Tensor:
    """(B, H, T, D) as the kernels write it: token by token, in each its heads."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _check_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> None:
    if bias is not None:
        assert bias.shape == (*query.shape[:3], key.shape[2]) and bias.dtype == query.dtype
        assert all(step % cuda_kernel.BIAS_ALIGNMENT == 0 for step in bias.stride()[:3]), "rows are aligned"


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, compute_lse: bool, dropout: float, causal: bool,
    *, scale: float,
) -> tuple[Any, ...]:  # fmt: skip
    """``_scaled_dot_product_efficient_attention``: as many heads of each, log-sum-exps padded."""
    assert query.shape[1] == key.shape[1] and compute_lse and dropout == 0.0
    _check_bias(bias, query, key)
    scores = _scores(query, key, bias, causal, scale)
    lse = F.pad(scores.logsumexp(-1), (0, -query.shape[2] % cuda_kernel.LSE_ALIGNMENT), value=torch.inf)
    return _by_tokens((scores.softmax(-1) @ value.float()).to(query.dtype)), lse, None, None


def efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, output: Tensor, lse: Tensor,
    seed: Tensor, offset: Tensor, dropout: float, wanted: list[bool], causal: bool, *, scale: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``_scaled_dot_product_efficient_attention_backward``."""
    _check_bias(bias, query, key)
    assert lse.shape[2] % cuda_kernel.LSE_ALIGNMENT == 0 and wanted == [True, True, True, False]
    assert output.stride(2) == output.shape[1] * output.shape[3], "the output is read token by token (PyTorch 138772)"
    scores = _scores(query, key, bias, causal, scale)
    return *_gradients(grad, query, key, value, output, lse[..., : query.shape[2]], scores, scale), None


def patched(monkeypatch: Any) -> None:
    """Let the kernels for CUDA be these."""
    for function in (flash, flash_backward, efficient, efficient_backward):
        monkeypatch.setattr(cuda_kernel, function.__name__, function)
