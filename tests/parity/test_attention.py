"""Retrieval causal attention: every kernel against a float64 loop, for every fusion, mask and grouping."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memlong.attention import (
    Memo,
    RetrievedKV,
    Scores,
    attend_with_memory,
    cuda_kernel,
    kernels,
    local_attention,
    retrieval_causal_attention,
)
from lightning_memlong.attention.functional import choose_kernel
from lightning_memlong.attention.masked import joint_mask
from lightning_memlong.attention.two_part import Part, TwoPartAttention
from lightning_memlong.errors import UserError
from tests.cuda_kernels import patched
from tests.reference import attention_oracle

ROWS, TOKENS, MEMORY, SIZE = 2, 6, 5, 8
HEADS = [(2, 2), (4, 2), (3, 1)]
SCALE = SIZE**-0.5
CASES = [
    (heads, kind, groups)
    for kind in ("full", "ragged", "one row empty")
    for heads, groups in zip(HEADS, (1, 3, 2), strict=True)
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries, the last one ragged; and what CUDA's kernels compute, here."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    patched(monkeypatch)


def tensors(heads: int, kv_heads: int, groups: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    mixer = torch.Generator().manual_seed(heads * 100 + kv_heads * 10 + groups)
    shapes = [(ROWS, heads, TOKENS), (ROWS, kv_heads, TOKENS), (ROWS, kv_heads, TOKENS)]
    shapes += [(ROWS * groups, kv_heads, MEMORY)] * 2
    return [
        torch.randn(*shape, SIZE, generator=mixer).to(dtype) * (1.5 if i == 0 else 1) for i, shape in enumerate(shapes)
    ]


def mask_of(kind: str, groups: int = 1) -> Tensor:
    mask = torch.ones(ROWS * groups, MEMORY, dtype=torch.bool)
    if kind == "ragged":
        mask[0, 3:] = mask[-1, :1] = False
    if kind == "one row empty":
        mask[-1] = False
    return mask


def sliding(width: int = 4) -> Tensor:
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return (distance >= 0) & (distance < width)


KERNELS = ["cpu_two_part", "cuda_two_part", "sdpa_masked", "eager_blockwise", "flex"]


def run(
    kernel: str, inputs: list[Tensor], memory: RetrievedKV, scores: Scores, local: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Joint attention by the kernel named, whatever would have been chosen."""
    import lightning_memlong.attention.functional as module

    chosen = module.choose_kernel
    module.choose_kernel = lambda *_: kernel  # type: ignore[assignment]
    try:
        return attend_with_memory(*inputs[:3], memory, None if local is None else local[None, None], scores)
    finally:
        module.choose_kernel = chosen


@pytest.mark.parametrize(("heads", "kind", "groups"), CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_joint_equals_oracle(kernel: str, heads: tuple[int, int], kind: str, groups: int) -> None:
    inputs, mask = tensors(*heads, groups), mask_of(kind, groups)
    memory = RetrievedKV(*inputs[3:], None if kind == "full" else mask)
    for local in (None, sliding()):
        expected = attention_oracle(*inputs, mask, "joint", local_mask=local)
        output, mass = run(kernel, inputs, memory, Scores(SCALE), local)
        torch.testing.assert_close(output.double(), expected, atol=3e-6, rtol=1e-5)
        assert (mass is None) == (kernel == "sdpa_masked")
        if mass is not None:
            values = [torch.zeros_like(t) if i == 2 else torch.ones_like(t) for i, t in enumerate(inputs)]
            share = attention_oracle(*inputs[:2], values[2], inputs[3], values[4], mask, "joint", local_mask=local)
            torch.testing.assert_close(mass.double(), share[..., 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["eager_blockwise", "flex"])
@pytest.mark.parametrize("fusion", ["joint", "gated"])
def test_soft_capped_scores_equal_oracle(fusion: str, kernel: str) -> None:
    inputs, gate, mask = tensors(4, 2), torch.randn(4), mask_of("ragged")
    memory = RetrievedKV(*inputs[3:], mask, gate=gate if fusion == "gated" else None)
    for cap in (0.7, 20.0):
        output, _ = run(kernel, inputs, memory, Scores(SCALE, softcap=cap), None)
        expected = attention_oracle(*inputs, mask, fusion, gate, softcap=cap)
        torch.testing.assert_close(output.double(), expected, atol=3e-6, rtol=1e-5)
    backend = "flex" if kernel == "flex" else "auto"
    alone = local_attention(*inputs[:3], None, Scores(SCALE, softcap=0.7), backend, Memo())
    nothing = torch.zeros(ROWS, MEMORY, dtype=torch.bool)
    expected = attention_oracle(*inputs, nothing, "joint", softcap=0.7)
    torch.testing.assert_close(alone.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kind", "groups"), CASES)
def test_gated_equals_oracle(heads: tuple[int, int], kind: str, groups: int) -> None:
    inputs, mask, gate = tensors(*heads, groups), mask_of(kind, groups), torch.randn(heads[0])
    for local in (None, sliding()):
        expected = attention_oracle(*inputs, mask, "gated", gate, local_mask=local)
        seen = None if local is None else local[None, None]
        output = retrieval_causal_attention(*inputs, memory_mask=mask, local_mask=seen, fusion="gated", gate=gate)
        torch.testing.assert_close(output.double(), expected, atol=3e-6, rtol=1e-5)
    if kind == "full":
        output = retrieval_causal_attention(*inputs, local_mask=seen, fusion="gated", gate=gate)
        torch.testing.assert_close(output.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kind", "groups"), CASES)
def test_gradients_agree(heads: tuple[int, int], groups: int, kind: str) -> None:
    inputs, weight = tensors(*heads, groups), torch.randn(ROWS, heads[0], TOKENS, SIZE)
    for local in (None, sliding()):
        results = []
        for kernel in ("sdpa_masked", "cpu_two_part", "cuda_two_part", "eager_blockwise"):
            copies = [t.clone().requires_grad_(i < 3) for i, t in enumerate(inputs)]
            memory = RetrievedKV(*copies[3:], None if kind == "full" else mask_of(kind, groups))
            output, _ = run(kernel, copies, memory, Scores(SCALE), local)
            (output * weight).sum().backward()
            results.append([output.detach(), *(t.grad for t in copies[:3])])
        for other in results[1:]:
            for slow, fast in zip(results[0], other, strict=True):
                torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_soft_capped_gradients_are_those_of_the_formula() -> None:
    inputs = tensors(4, 2)
    results = []
    for fused in (True, False):
        q, k, v = (t.clone().requires_grad_() for t in inputs[:3])
        if fused:
            output = local_attention(q, k, v, None, Scores(SCALE, softcap=0.7), "auto", Memo())
        else:
            keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
            scores = 0.7 * (q @ keys.transpose(2, 3) * SCALE / 0.7).tanh()
            output = scores.masked_fill(~torch.ones(TOKENS, TOKENS).tril().bool(), -torch.inf).softmax(-1) @ values
        output.square().sum().backward()
        results.append((q.grad, k.grad, v.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["cpu_two_part", "cuda_two_part"])
def test_bfloat16_is_within_its_rounding_and_sums_in_float32(kernel: str) -> None:
    for groups, kind in itertools.product((1, 3), ("full", "ragged")):
        inputs, mask = tensors(4, 2, groups, torch.bfloat16), mask_of(kind, groups)
        expected = attention_oracle(*inputs, mask, "joint")
        copies = [t.clone().requires_grad_(i < 3) for i, t in enumerate(inputs)]
        masked = mask if kind == "ragged" else None
        output, mass = run(kernel, copies, RetrievedKV(*copies[3:], masked), Scores(SCALE), None)
        assert output.dtype == torch.bfloat16 and mass is not None and mass.dtype == torch.float32
        torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)
        wide = [t.float().requires_grad_(i < 3) for i, t in enumerate(inputs)]
        (output.float().square().sum()).backward()
        run("sdpa_masked", wide, RetrievedKV(*wide[3:], mask), Scores(SCALE), None)[0].square().sum().backward()
        for a, b in zip(copies[:3], wide[:3], strict=True):
            assert (a.grad.float() - b.grad).norm() < 0.03 * b.grad.norm()


def test_capped_scores_stay_float32_under_autocast() -> None:
    inputs = tensors(4, 2, dtype=torch.bfloat16)
    plain = kernels.blockwise(*inputs[:3], None, True, SCALE, 20.0)
    with torch.autocast("cpu", torch.bfloat16):
        under = kernels.blockwise(*inputs[:3], None, True, SCALE, 20.0)
    assert under[1].dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_a_mask_made_while_evaluating_can_be_trained_with() -> None:
    from lightning_memlong.attention.flex import _causal

    with torch.inference_mode():
        mask = _causal(7, 7, "cpu")
    assert not mask.kv_indices.is_inference() and mask is _causal(7, 7, "cpu")


@pytest.mark.parametrize("keys", [13, 32])
def test_masks_for_cuda_are_aligned_and_of_the_querys_type(keys: int) -> None:
    query, key = torch.zeros(2, 4, 6, 8, dtype=torch.bfloat16), torch.zeros(2, 4, keys, 8, dtype=torch.bfloat16)
    wide = torch.randn(1, 1, 6, keys + 3)
    for mask in (wide[..., :keys], wide[..., 3:], torch.ones(2, keys, dtype=torch.bool), wide.mT[:, :, :6, :6]):
        bias = cuda_kernel._bias(mask, query, key)
        assert bias is not None and bias.dtype == torch.bfloat16 and bias.shape == (2, 4, 6, mask.shape[-1])
        assert bias.stride(3) == 1 and all(step % 16 == 0 for step in bias.stride()[:3])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_cudas_kernels_take_what_they_are_given(
    dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PyTorch's own rules for shapes, types and places, without a GPU; heads of a size that is padded."""
    monkeypatch.undo()
    monkeypatch.setattr(cuda_kernel, "_by_tokens", lambda tensor: tensor)  # what copies needs a card
    with FakeTensorMode():
        sizes = [(2, 8, 48), (2, 4, 48), (2, 4, 48), (2, 4, 32), (2, 4, 32)]
        query, key, value, *memory = [torch.empty(*size, 100, dtype=dtype, device="cuda:0") for size in sizes]
        real = torch.empty(2, 1, 1, 32, dtype=dtype, device="cuda:0") if masked else None
        local = torch.empty(1, 1, 48, 48, dtype=dtype, device="cuda:0") if masked else None
        kernel = cuda_kernel.CUDA_KERNEL
        output, lse = kernel.attend(query, key, value, local, not masked, 0.1)
        for tensor in (output, kernel.attend(query, *memory, real, False, 0.1)[0]):
            assert tensor.shape == query.shape and tensor.dtype == dtype
        assert lse.shape == query.shape[:3] and lse.dtype == torch.float32
        found = kernel.gradient(Part(output, query, key, value, output, lse, 0.1), local, not masked)
        for gradient, tensor in zip(found, (query, key, value), strict=True):
            assert gradient.shape == tensor.shape and gradient.dtype == dtype
        read = Part(output, query, *memory, output, lse, 0.1)
        assert kernel.query_gradient(read, real, None).shape == query.shape


def test_what_is_chosen() -> None:
    query, plain = torch.zeros(1, 1, 1, 8), Scores(1.0)
    assert choose_kernel("auto", query, 1, plain) == choose_kernel("auto", query.bfloat16(), 8, plain) == "cpu_two_part"
    assert choose_kernel("auto", query, 1, Scores(1.0, dropout=0.1)) == "sdpa_masked"
    assert choose_kernel("auto", query.half(), 1, plain) == choose_kernel("sdpa", query, 1, plain) == "sdpa_masked"
    assert choose_kernel("auto", query, 1, Scores(1.0, softcap=5.0)) == "eager_blockwise"
    assert choose_kernel("flex", query, 1, plain) == "flex"
    assert choose_kernel("two_part", query, 3, plain) == "cpu_two_part"
    for asking, scores in ((query.half(), plain), (query, Scores(1.0, softcap=5.0)), (query, Scores(1.0, dropout=0.1))):
        with pytest.raises(UserError, match="model.attention=.'two_part' for.*choose auto"):
            choose_kernel("two_part", asking, 1, scores)
    for backend, scores in (("flex", Scores(1.0, dropout=0.1)), ("auto", Scores(1.0, softcap=5.0, dropout=0.1))):
        with pytest.raises(UserError, match="attention dropout of 0.1.*attention_dropout to 0"):
            choose_kernel(backend, query, 1, scores)
    inputs = [t.requires_grad_() for t in tensors(4, 2)]
    with pytest.raises(UserError, match="model.attention='flex'.*auto or sdpa"):
        retrieval_causal_attention(*inputs, backend="flex")
    assert TwoPartAttention.__name__ in type(retrieval_causal_attention(*inputs).grad_fn).__name__


@pytest.mark.parametrize("kernel", [*KERNELS, "gated"])
def test_a_prefix_reads_no_memory(kernel: str) -> None:
    heads, groups, prefix = (4, 2), 2, 2
    inputs, mask = tensors(*heads, groups), mask_of("ragged", groups)
    gate = torch.randn(4) if kernel == "gated" else None
    with_prefix = RetrievedKV(*inputs[3:], mask, prefix, gate)
    copies = [t.clone().requires_grad_(i < 3 and kernel != "flex") for i, t in enumerate(inputs)]
    output, mass = run(kernel, copies, with_prefix, Scores(SCALE), None)
    nothing = torch.zeros(ROWS, MEMORY, dtype=torch.bool)
    plain = attention_oracle(*inputs[:3], *tensors(*heads)[3:], nothing, "joint")
    torch.testing.assert_close(output[:, :, :prefix].double(), plain[:, :, :prefix], atol=3e-6, rtol=1e-5)
    # The oracle knows no prefix: give the others' part as a row that is two tokens longer in front.
    for row in range(ROWS):
        own = slice(row * groups, row * groups + groups)
        for token in range(prefix, TOKENS):
            group = (token - prefix) // ((TOKENS - prefix) // groups)
            memory = [t[own][group : group + 1] for t in inputs[3:]]
            local = [t[row : row + 1, :, : token + 1] for t in inputs[1:3]]
            query = torch.cat([inputs[0][row : row + 1, :, :token], inputs[0][row : row + 1, :, token : token + 1]], 2)
            fusion = "gated" if kernel == "gated" else "joint"
            expected = attention_oracle(query, *local, *memory, mask[own][group : group + 1], fusion, gate)
            torch.testing.assert_close(output[row, :, token].double(), expected[0, :, token], atol=3e-6, rtol=1e-5)
    if kernel.endswith("two_part"):
        output.square().sum().backward()
        again = [t.clone().requires_grad_(i < 3) for i, t in enumerate(inputs)]
        run("sdpa_masked", again, with_prefix, Scores(SCALE), None)[0].square().sum().backward()
        assert mass is not None and mass.shape == (ROWS, 4, TOKENS - prefix)
        for a, b in zip(copies[:3], again[:3], strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_one_mask_for_all_heads() -> None:
    assert joint_mask(mask_of("ragged", 3).view(ROWS, 3, MEMORY), TOKENS).shape == (
        ROWS,
        1,
        TOKENS,
        3 * MEMORY + TOKENS,
    )


def test_nothing_gathered_is_modified() -> None:
    inputs = tensors(4, 2)
    before = [t.clone() for t in inputs]
    for fusion, mask in itertools.product(("joint", "gated"), (None, mask_of("ragged"))):
        retrieval_causal_attention(*inputs, memory_mask=mask, fusion=fusion, gate=torch.ones(4))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("wrong", [{"fusion": "sum"}, {"fusion": "gated"}])
def test_unknown_fusion_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"fusion='{wrong['fusion']}'"):
        retrieval_causal_attention(*tensors(4, 2), **wrong)
