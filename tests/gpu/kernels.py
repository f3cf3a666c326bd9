"""Attention against a float64 reference, forward and backward, with any backend."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memlong.attention import retrieval_causal_attention
from tests.gpu.conftest import error
from tests.reference import attention_oracle

ROWS, TOKENS, MEMORY = 2, 24, 16
GOALS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """What is attended to, and how."""

    fusion: str
    heads: tuple[int, int] = (4, 2)
    groups: int = 1
    mask: str = "full"
    softcap: float | None = None
    size: int = 32

    def __str__(self) -> str:
        cap = "" if self.softcap is None else "-capped"
        return f"{self.fusion}-{self.heads[0]}x{self.heads[1]}-G{self.groups}-{self.mask}-{self.size}{cap}"


def tensors(case: Case) -> list[Tensor]:
    """Query, key, value, memory keys and memory values."""
    mixer = torch.Generator().manual_seed(1)
    (heads, shared), owners = case.heads, ROWS * case.groups
    shapes = [(ROWS, heads, TOKENS), (ROWS, shared, TOKENS), (ROWS, shared, TOKENS)]
    shapes += [(owners, shared, MEMORY)] * 2
    return [torch.randn(*shape, case.size, generator=mixer) for shape in shapes]


def mask_of(case: Case) -> Tensor:
    """Which retrieved tokens are real."""
    mask = torch.ones(ROWS * case.groups, MEMORY, dtype=torch.bool)
    if case.mask != "full":
        mask[0, 11:] = mask[-1, :3] = False
    if case.mask == "empty":
        mask[-1] = False
    return mask


def reference(inputs: list[Tensor], mask: Tensor, case: Case, gate: Tensor) -> Tensor:
    """The same in float64 with autograd, all scores at once; :func:`attention_oracle` vouches for it."""
    query, key, value, memory_key, memory_value = inputs
    repeat = case.heads[0] // case.heads[1]
    key, value, memory_key, memory_value = (
        t.repeat_interleave(repeat, 1) for t in (key, value, memory_key, memory_value)
    )
    folded = query.unflatten(2, (case.groups, -1)).transpose(1, 2).flatten(0, 1)
    remembered = _scores(folded, memory_key, case).masked_fill(~mask[:, None, None], -torch.inf)
    remembered = remembered.unflatten(0, (ROWS, case.groups)).transpose(1, 2)  # (B, H, G, T / G, M)
    local = _scores(query, key, case).masked_fill(~torch.ones(TOKENS, TOKENS).tril().bool(), -torch.inf)
    local = local.unflatten(2, (case.groups, -1))
    values = memory_value.unflatten(0, (ROWS, case.groups)).transpose(1, 2)
    if case.fusion == "joint":
        weights = torch.cat([remembered, local], dim=-1).softmax(-1)
        return (weights[..., :MEMORY] @ values + weights[..., MEMORY:] @ value[:, :, None]).flatten(2, 3)
    weights = remembered.softmax(-1).nan_to_num(0.0)
    return (local.softmax(-1) @ value[:, :, None] + gate[None, :, None, None, None] * (weights @ values)).flatten(2, 3)


def _scores(query: Tensor, key: Tensor, case: Case) -> Tensor:
    scores = query @ key.transpose(2, 3) / case.size**0.5
    return scores if case.softcap is None else case.softcap * torch.tanh(scores / case.softcap)


def check(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    measured: Callable[[str, float, float], None],
    backward: bool = True,
) -> None:
    """Compare output and gradients; inputs are rounded first, so that only the arithmetic differs."""
    rounded, mask, gate = [t.to(dtype) for t in tensors(case)], mask_of(case), torch.tensor([0.5, -1.0, 0.0, 2.0])
    gate = gate[: case.heads[0]]
    exact = [t.double().requires_grad_(i < 3) for i, t in enumerate(rounded)]
    expected = reference(exact, mask, case, gate.double())
    oracle = attention_oracle(*rounded, mask, case.fusion, gate, softcap=case.softcap)
    assert error(expected, oracle) < 1e-9, "the reference is wrong"
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight.double()).sum().backward()
    copies = [t.to(device).requires_grad_(i < 3 and backward) for i, t in enumerate(rounded)]
    output = retrieval_causal_attention(
        *copies,
        memory_mask=None if case.mask == "full" else mask.to(device),
        fusion=case.fusion,
        gate=gate.to(device) if case.fusion == "gated" else None,
        softcap=case.softcap,
        backend=backend,
    )
    assert output.dtype == dtype and output.device.type == device.type
    name = f"attention, {case.fusion}, {backend}, {str(dtype).removeprefix('torch.')}: relative error"
    measured(f"{name} of the output", error(output, expected), GOALS[dtype])
    if backward:
        (output.float() * weight.to(device)).sum().backward()
        for slow, fast in zip(exact[:3], copies[:3], strict=True):
            assert slow.grad is not None and fast.grad is not None
            measured(f"{name} of gradients", error(fast.grad, slow.grad), GOALS[dtype])
