"""Whether CUDA's fused kernels, called part by part, are right on a card: tried before they are first used.

Their arguments are PyTorch's own business, not promised to anybody, and differ from release to release.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from lightning_memlong.attention.cuda_kernel import CUDA_KERNEL
from lightning_memlong.attention.two_part import TwoPartAttention

log = logging.getLogger(__name__)

ROWS, HEADS, KV_HEADS, TOKENS, MEMORY = 2, 4, 2, 44, 60
ALLOWED = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative error; what is wrong is wrong by much more."""


def two_parts_are_right(query: Tensor) -> bool:
    """Whether they give what plain operations give, output and gradients, for queries like these on their card."""
    return _checked(query.device, query.dtype, query.shape[-1])


@cache
def _checked(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    found = "not tried"
    try:
        with torch.inference_mode(False), torch.enable_grad():
            worst = max(_error(device, dtype, size, masked) for masked in (False, True))
        right, found = worst <= ALLOWED[dtype], f"relative error {worst:.2g}"
    except (RuntimeError, TypeError, AssertionError) as error:
        right, found = False, str(error).splitlines()[0]
    kind = f"{dtype} with heads of {size} on {device}"
    if right:
        log.info("model.attention auto: two parts by CUDA's fused kernels for %s (checked: %s)", kind, found)
    else:
        log.warning(
            "model.attention auto: one masked call for %s, since CUDA's kernels in two parts differ or fail (%s). "
            "Training with memory is slower than it could be; please tell the project.", kind, found
        )  # fmt: skip
    return right


def _error(device: torch.device, dtype: torch.dtype, size: int, masked: bool) -> float:
    """Largest relative error of the output and of the gradients of what is differentiated."""
    mixer = torch.Generator().manual_seed(size)
    shapes = [(HEADS, TOKENS), *[(KV_HEADS, TOKENS)] * 2, *[(KV_HEADS, MEMORY)] * 2, (HEADS, TOKENS)]
    tensors = [torch.randn(ROWS, *shape, size, generator=mixer, dtype=torch.float32) for shape in shapes]
    mask = (torch.arange(MEMORY) % 7 != 3).expand(ROWS, MEMORY).contiguous() if masked else None
    bias = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float32)
    *rounded, weight = (t.to(dtype) for t in tensors)
    expected = _plain([t.double().requires_grad_() for t in rounded], bias.double().requires_grad_(), mask, weight)
    there = [t.to(device).requires_grad_(place < 3) for place, t in enumerate(rounded)]
    found = _two_part(there, bias.to(device).requires_grad_(), None if mask is None else mask.to(device), weight)
    return max(
        float((one.double().cpu() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)
    )


def _gradients(output: Tensor, weight: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad((output * weight.to(output.device, output.dtype)).sum(), leaves)]


def _two_part(tensors: list[Tensor], bias: Tensor, mask: Tensor | None, weight: Tensor) -> list[Tensor]:
    query, key, value, memory_key, memory_value = tensors
    scale, nothing = query.shape[-1] ** -0.5, (None, None, None)
    output, _ = TwoPartAttention.apply(
        query, key, value, query, memory_key, memory_value, bias, None, mask, *nothing, scale, None, CUDA_KERNEL
    )
    return _gradients(output, weight, [query, key, value, bias])


def _plain(tensors: list[Tensor], bias: Tensor, mask: Tensor | None, weight: Tensor) -> list[Tensor]:
    query, key, value, memory_key, memory_value = tensors
    key, value, memory_key, memory_value = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in tensors[1:])
    scores = torch.cat([query @ memory_key.mT, query @ key.mT], dim=-1) * query.shape[-1] ** -0.5
    scores = scores + torch.cat([bias.expand(MEMORY, HEADS).T, bias.new_zeros(HEADS, TOKENS)], dim=-1)[:, None]
    seen = torch.ones(ROWS, 1, TOKENS, MEMORY + TOKENS, dtype=torch.bool)
    seen[..., MEMORY:] = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    if mask is not None:
        seen[..., :MEMORY] = mask[:, None, None]
    output = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ torch.cat([memory_value, value], dim=2)
    return _gradients(output, weight, [*tensors[:3], bias])
