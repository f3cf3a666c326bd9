"""Where memory stands, in every family: against keys turned there by hand."""

from typing import Any

import pytest
import torch

from lightning_memlong.attention import Scores, attend_with_memory
from lightning_memlong.memlong import MemLong
from tests.parity.test_families import MODELS, ROWS, TOKENS, build, remembered, windows


@pytest.mark.parametrize("family", MODELS)
def test_a_query_at_a_distance_is_as_keys_turned_back_so_far(family: str) -> None:
    """Rotary attention sees differences of positions: turning the query to D reads as turning keys to t - D."""
    model = MemLong(build(family), memory_layer=0, retrieval_layers=[0, 1, 2, 3], memory_distance=7).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(3, 9)
    for layer in model.retrieval_layers:
        size = model.backbone.get_decoder().layers[layer].self_attn.head_dim
        query, key = torch.randn(2, 1, 2, len(tokens), size, generator=generator)
        turned = model.rotary.rotate(query[None], tokens[None], [layer], 8)[0]
        angles = model.rotary.at_distance(layer, 7, tokens, 8)
        read = turned if angles is None else model.rotary.turn_query(turned, angles)
        at = model.rotary.rotate(key[None], tokens[None] - 7, [layer], 8)[0]
        torch.testing.assert_close((read * key).sum(-1), (turned * at).sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama, YaRN", "Gemma 2", "Gemma 3 (text)", "SmolLM3"])
@torch.no_grad()
def test_what_stands_near_and_far_at_once_is_read_as_keys_turned_there(family: str) -> None:
    """The same as keys turned by hand: near ones to running positions, far ones for each token to t - distance.

    Those far weigh as if they were 20.
    """
    first, second = windows()
    settings: dict[str, Any] = {"position": "fixed", "memory_near": 4, "memory_distance": 40, "memory_reference": 20}
    model = MemLong(build(family), memory_layer=0, retrieval_layers=[0, 2], **settings).eval()
    memory = remembered(model(first), chunks=3)
    memory.mask[1, 8:10] = False  # row 1 has two near tokens less
    memory.full, memory.asked = False, True
    context = model.contexts.new_context(memory, second, None)
    query = torch.randn(ROWS, 4, TOKENS, memory.keys.shape[-1], generator=torch.Generator().manual_seed(2))
    value = torch.randn(ROWS, 2, TOKENS, memory.keys.shape[-1], generator=torch.Generator().manual_seed(3))
    tokens = torch.arange(TOKENS)
    for place, layer in enumerate(model.retrieval_layers):
        turn = model.rotary.rotate
        rotated = turn(query[None], tokens[None], [layer], TOKENS - 1)[0]
        key = turn(value[None], tokens[None], [layer], TOKENS - 1)[0]
        read = context.retrieved(layer, rotated)
        output = attend_with_memory(rotated, key, value, read, None, Scores(0.3))[0]
        near_at = torch.stack([torch.arange(-4, 0), torch.tensor([-2, -2, -2, -1])])
        near = turn(memory.keys[place][:, :, 8:][None], near_at, [layer], TOKENS - 1)[0]
        for t in range(TOKENS):
            far = turn(memory.keys[place][:, :, :8][None], tokens[t : t + 1][None] - 40, [layer], TOKENS - 1)[0]
            keys = torch.cat([far, near, key[:, :, : t + 1]], dim=2)
            values = torch.cat([memory.values[place], value[:, :, : t + 1]], dim=2)
            seen = torch.cat([memory.mask, torch.ones(ROWS, t + 1, dtype=torch.bool)], dim=1)[:, None, None]
            seen = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            seen[..., :8] += (20 / memory.mask[:, :8].sum(1)).log()[:, None, None, None]
            expected = torch.nn.functional.scaled_dot_product_attention(
                rotated[:, :, t : t + 1], keys, values, attn_mask=seen, scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(output[:, :, t : t + 1], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["Llama, YaRN", "SmolLM3"])
@torch.no_grad()
def test_what_lies_close_before_the_window_stands_where_it_lies(family: str) -> None:
    """Rows with more and less of it: the same as each key turned by hand to where it stands for each token."""
    first, second = windows()
    settings: dict[str, Any] = {"position": "fixed", "memory_near": 8, "memory_distance": 40, "memory_reference": 20}
    model = MemLong(build(family), memory_layer=0, retrieval_layers=[0, 2], **settings).eval()
    memory = remembered(model(first), chunks=3)
    memory.positions = torch.tensor([[0, 4, 14], [-1, 9, 12]])
    memory.begin, memory.asked = torch.tensor([20, 17]), True
    memory.mask[1, :4], memory.mask[1, 11], memory.full = False, False, False
    near = torch.tensor([[False, False, True], [False, True, True]]).repeat_interleave(4, 1)
    context = model.contexts.new_context(memory, second, None)
    query = torch.randn(ROWS, 4, TOKENS, memory.keys.shape[-1], generator=torch.Generator().manual_seed(2))
    value = torch.randn(ROWS, 2, TOKENS, memory.keys.shape[-1], generator=torch.Generator().manual_seed(3))
    tokens = torch.arange(TOKENS)
    lies = (memory.positions[..., None] + torch.arange(4)).flatten(1) - memory.begin[:, None]
    for place, layer in enumerate(model.retrieval_layers):
        turn = model.rotary.rotate
        rotated = turn(query[None], tokens[None], [layer], TOKENS - 1)[0]
        key = turn(value[None], tokens[None], [layer], TOKENS - 1)[0]
        output = attend_with_memory(rotated, key, value, context.retrieved(layer, rotated), None, Scores(0.3))[0]
        for t in range(TOKENS):
            stands = torch.where(near, lies, t - 40)
            keys = torch.cat([turn(memory.keys[place][None], stands, [layer], TOKENS - 1)[0], key[:, :, : t + 1]], 2)
            values = torch.cat([memory.values[place], value[:, :, : t + 1]], dim=2)
            seen = torch.zeros(ROWS, 12 + t + 1)
            seen[:, :12].masked_fill_(~memory.mask, -torch.inf)
            far = memory.mask & ~near
            seen[:, :12] += torch.where(far, (20 / far.sum(1, keepdim=True).clamp(min=1)).log(), 0.0)
            expected = torch.nn.functional.scaled_dot_product_attention(
                rotated[:, :, t : t + 1], keys, values, attn_mask=seen[:, None, None], scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(output[:, :, t : t + 1], expected, atol=1e-4, rtol=1e-3)
