"""The parts of a modern block: RMSNorm, rotary positions, SwiGLU, a modulation without shifts or per token."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from dit_fast.backend import force
from dit_fast.errors import ConfigError
from dit_fast.nn.attention import Attention
from dit_fast.nn.block import Block
from dit_fast.nn.final_layer import FinalLayer
from dit_fast.nn.mlp import SwiGLU
from dit_fast.nn.norm import RMSNorm
from dit_fast.nn.rotary import axial_rotary, interleaved_rotary
from dit_fast.ops import qk_norm
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close


def randomised(module):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return module.double()


def tokens(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, rotary):
    """As queries [N, H, T, d] are turned."""
    qkv = torch.cat([x.transpose(1, 2).flatten(2)] * 3, dim=2)
    return qk_norm(qkv, x.shape[1], None, None, None, None, norm="none", rotary=rotary)[0]


def test_rms_norm_divides_by_the_root_mean_square_in_fp32():
    norm, x = randomised(RMSNorm(6)), tokens(2, 3, 6)
    assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight, 1e-12)
    narrow = RMSNorm(6)(1e4 * x.half())  # whose squares are infinite in half precision
    assert narrow.dtype == torch.float16
    assert_close(narrow, F.rms_norm(x.half().double(), (6,)), 1e-3)


def test_rotary_pairs_turn_by_position_times_frequency():
    """Each pair as a complex number, against the published formulas; leading tokens stay."""
    head, grid = 8, (3, 2)
    x = tokens(2, 2, 7, head)
    turned = torch.view_as_complex(rotate(x, axial_rotary(head, grid, leading=1)).unflatten(-1, (-1, 2)))
    plain = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    assert_close(torch.view_as_real(turned[:, :, 0]), torch.view_as_real(plain[:, :, 0]), 1e-12)
    for token in range(6):
        row, column = divmod(token, 2)
        for pair in range(4):
            position = row if pair < 2 else column
            angle = position * 10000 ** (-2 * (pair % 2) / (head / 2))
            expected = plain[:, :, 1 + token, pair] * torch.exp(torch.tensor(1j * angle, dtype=torch.complex128))
            assert_close(torch.view_as_real(turned[:, :, 1 + token, pair]), torch.view_as_real(expected), 1e-6)
    turned = torch.view_as_complex(rotate(x[:, :, 1:], interleaved_rotary(head, grid)).unflatten(-1, (-1, 2)))
    for token in range(6):
        row, column = divmod(token, 2)
        for pair in range(4):
            position = 16 * column / 1 if pair % 2 == 0 else 16 * row / 2
            angle = position * 10000 ** (-4 * (pair // 2) / head)
            expected = plain[:, :, 1 + token, pair] * torch.exp(torch.tensor(1j * angle, dtype=torch.complex128))
            assert_close(torch.view_as_real(turned[:, :, token, pair]), torch.view_as_real(expected), 1e-5)


@loop_over("tables", [axial_rotary, interleaved_rotary])
def test_rotary_positions_need_pairs_for_two_axes(tables):
    with pytest.raises(ConfigError, match="width 6"):
        tables(6, (2, 2))


@loop_over("norm", ["layer", "rms"])
def test_attention_normalises_heads_and_then_turns_them(norm):
    module = randomised(Attention(8, 2, True, "math", norm, bias=False))
    x, rotary = tokens(2, 4, 8), axial_rotary(4, (2, 2))
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    query, key = rotate(module.q_norm(query), rotary), rotate(module.k_norm(key), rotary)
    mixed = ((query @ key.mT) / math.sqrt(4)).softmax(-1) @ value
    assert_close(module(x, rotary), module.proj(mixed.transpose(1, 2).flatten(2)), 1e-12)
    assert module.qkv.bias is None


def test_swiglu_gates_its_second_half_with_its_first():
    module, x = randomised(SwiGLU(9)), tokens(2, 3, 9)
    hidden = module.w12(x)
    assert hidden.shape[-1] == 2 * 24
    assert_close(module(x), module.w3(F.silu(hidden[..., :24]) * hidden[..., 24:]), 1e-12)
    assert module.flops(5) == 2 * 5 * (9 * 48 + 24 * 9)


@loop_over("norm", ["layer", "rms"])
@loop_over("shift", [True, False])
@loop_over("per_token", [True, False])
def test_a_block_without_shifts_or_modulated_per_token_matches_its_equations(norm, shift, per_token):
    block = randomised(Block(8, 2, norm=norm, mlp=SwiGLU, shift=shift))
    x, c = tokens(2, 3, 8), tokens(2, 3, 8, seed=3) if per_token else tokens(2, 8, seed=3)
    parts = block.adaLN_modulation[1](F.silu(c)).unflatten(-1, (-1, 8))
    parts = (parts if per_token else parts[:, None]).unbind(2)
    zero = torch.zeros(1, 1, 1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts if shift else (zero, *parts[:2], zero, *parts[2:])

    def normed(z, weighted):
        return weighted(z) if norm == "rms" else F.layer_norm(z, (8,), eps=1e-6)

    expected = x + gate_a * block.attn(normed(x, block.norm1) * (1 + scale_a) + shift_a)
    expected = expected + gate_m * block.mlp(normed(expected, block.norm2) * (1 + scale_m) + shift_m)
    assert_close(block(x, c)[0], expected, 1e-12)


@loop_over("per_token", [True, False])
def test_the_head_has_the_norm_of_the_blocks(per_token):
    head = randomised(FinalLayer(8, 2, 3, norm="rms"))
    x, c = tokens(2, 3, 8), tokens(2, 3, 8, seed=3) if per_token else tokens(2, 8, seed=3)
    shift, scale = head.adaLN_modulation(c if per_token else c[:, None]).chunk(2, dim=-1)
    assert_close(head(x, c), head.linear(head.norm_final(x) * (1 + scale) + shift), 1e-12)


@loop_over("shift", [True, False])
@loop_over("backend", ["auto", "torch"])
def test_a_block_in_single_precision_stays_near_the_exact_one(shift, backend):
    """Compiled ops, where there are some, against plain torch in float64: values and all gradients."""
    rotary, sides = axial_rotary(8, (2, 2)), []
    for dtype in (torch.float32, torch.float64):
        block = randomised(Block(16, 2, True, "math", "rms", SwiGLU, shift)).to(dtype)
        x, c = (part.to(dtype).requires_grad_() for part in (tokens(2, 4, 16), tokens(2, 16, seed=3)))
        with force(backend) if backend == "torch" else nullcontext():
            out = block(x, c, rotary=rotary)[0]
        sides.append([out, *torch.autograd.grad(out.sin().sum(), [x, c, *block.parameters()])])
    for ours, exact in zip(*sides, strict=True):
        assert_close(ours, exact, 3e-6)
