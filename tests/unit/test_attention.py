"""Retrieval causal attention against a float64 loop oracle."""

import itertools

import pytest
import torch

from lightning_memlong.attention import retrieval_causal_attention
from lightning_memlong.kernels import SplitJointAttention
from tests.reference import attention_oracle

ROWS, TOKENS, MEMORY, SIZE = 3, 6, 5, 8


def tensors(heads: int, kv_heads: int, memory: int = MEMORY) -> list[torch.Tensor]:
    shapes = [(heads, TOKENS), (kv_heads, TOKENS), (kv_heads, TOKENS), (kv_heads, memory), (kv_heads, memory)]
    return [torch.randn(ROWS, h, t, SIZE) for h, t in shapes]


def masks() -> dict[str, torch.Tensor]:
    ragged = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    return {"full": torch.ones(ROWS, MEMORY, dtype=torch.bool), "ragged": ragged}


@pytest.mark.parametrize(
    ("fusion", "kind", "heads"),
    list(itertools.product(("joint", "gated"), ("full", "ragged"), ((4, 4), (4, 2), (6, 1)))),
)
def test_equals_oracle(fusion: str, kind: str, heads: tuple[int, int]) -> None:
    inputs, mask, gate = tensors(*heads), masks()[kind], torch.randn(heads[0])
    expected = attention_oracle(*inputs, mask, fusion, gate)
    output = retrieval_causal_attention(*inputs, memory_mask=mask, fusion=fusion, gate=gate)
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_split_kernel_equals_masked_attention_with_gradients(heads: tuple[int, int]) -> None:
    inputs = tensors(*heads, memory=7)
    weight = torch.randn(ROWS, heads[0], TOKENS, SIZE)
    results = []
    for mask in (None, torch.ones(ROWS, 7, dtype=torch.bool)):  # None takes the split kernel, a mask does not
        copies = [t.clone().requires_grad_(i < 3) for i, t in enumerate(inputs)]
        output = retrieval_causal_attention(*copies, memory_mask=mask)
        (output * weight).sum().backward()
        results.append([output.detach(), *(t.grad for t in copies[:3])])
        assert (SplitJointAttention.__name__ in type(output.grad_fn).__name__) == (mask is None)
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_sliding_local_mask_is_kept() -> None:
    inputs = tensors(4, 2)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    local = ((distance >= 0) & (distance < 3))[None, None]
    output = retrieval_causal_attention(*inputs, local_mask=local)
    changed = [t.clone() for t in inputs]
    changed[1][:, :, 0] += 5.0
    changed[2][:, :, 0] += 5.0
    after = retrieval_causal_attention(*changed, local_mask=local)
    assert torch.equal(output[:, :, 3:], after[:, :, 3:])
    assert not torch.allclose(output[:, :, :3], after[:, :, :3])


def test_nothing_gathered_is_modified() -> None:
    inputs = tensors(4, 2)
    before = [t.clone() for t in inputs]
    for fusion, mask in itertools.product(("joint", "gated"), (None, masks()["ragged"])):
        retrieval_causal_attention(*inputs, memory_mask=mask, fusion=fusion, gate=torch.ones(4))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_unknown_fusion_is_refused() -> None:
    with pytest.raises(ValueError, match="fusion='sum'"):
        retrieval_causal_attention(*tensors(4, 2), fusion="sum")
