"""patch.apply on LightningDiT's published structure: RMSNorm, rotary positions, SwiGLU, modulation without shifts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dit_fast import patch
from dit_fast.patch import published
from tests.helpers.cases import loop_over
from tests.helpers.published_models import (
    Attention,
    Mlp,
    Transformer,
    check_bf16_autocast,
    check_fifty_steps,
    inputs,
    loss_of,
)

VARIANTS = {
    "default": {},
    "qknorm": {"qk_norm": True},
    "woshift": {"qk_norm": True, "shift": False},
    "layernorm": {"qk_norm": True, "rms": False, "swiglu": False},
}


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # the published code has float(), too little for fp64
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Rope(nn.Module):
    """Tables of any kind: what it does with them is what counts."""

    def __init__(self, tokens, width):
        super().__init__()
        angles = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(width // 2)
        self.register_buffer("freqs_cos", angles.repeat_interleave(2, dim=1).cos())
        self.register_buffer("freqs_sin", angles.repeat_interleave(2, dim=1).sin())

    def forward(self, t):
        pairs = t.unflatten(-1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        return t * self.freqs_cos + turned * self.freqs_sin


class HalvesRope(Rope):
    """Turns the first half of a head against the second."""

    def forward(self, t):
        return t * self.freqs_cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), dim=-1) * self.freqs_sin


class RopeAttention(Attention):
    def __init__(self, width, heads, qk_norm, rms):
        super().__init__(width, heads, qk_norm)
        if qk_norm and rms:
            self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x, rope=None):
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj_drop(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)))


class SwiGLUFFN(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * (8 * width // 3)), nn.Linear(8 * width // 3, width)

    def forward(self, x):
        first, second = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(first) * second)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + (0 if shift is None else shift.unsqueeze(1))


class Block(nn.Module):
    def __init__(self, width, heads, qk_norm=False, rms=True, swiglu=True, shift=True):
        super().__init__()
        norm = RMSNorm if rms else (lambda d: nn.LayerNorm(d, elementwise_affine=False, eps=1e-6))
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = RopeAttention(width, heads, qk_norm, rms)
        self.mlp = SwiGLUFFN(width) if swiglu else Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if shift else 4) * width))
        self.wo_shift = not shift

    def forward(self, x, c, feat_rope=None):
        parts = self.adaLN_modulation(c).chunk(4 if self.wo_shift else 6, dim=1)
        if self.wo_shift:
            parts = (None, *parts[:2], None, *parts[2:])
        x = x + parts[2].unsqueeze(1) * self.attn(modulate(self.norm1(x), parts[0], parts[1]), rope=feat_rope)
        return x + parts[5].unsqueeze(1) * self.mlp(modulate(self.norm2(x), parts[3], parts[4]))


class LightningDiT(Transformer):
    def __init__(self, rope=Rope, rms=True, **switches):
        super().__init__("sit", depth=2, block=lambda width, heads, _: Block(width, heads, rms=rms, **switches))
        if rms:
            self.final_layer.norm_final = RMSNorm(32)
        self.feat_rope = rope(16, 8)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        return self.unpatchify(self.final_layer(x, c))


def pair(variant="default", rope=Rope):
    torch.manual_seed(0)
    model = LightningDiT(rope, **VARIANTS[variant])
    return model, copy.deepcopy(model)


def loss(model, number):
    return loss_of(model(*inputs(seed=number)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fifty_steps_have_the_same_losses(variant):
    model, patched = pair(variant)
    handle = patch.apply(patched, ops=patch.OPS)
    assert not handle.report.refused
    taken = {path: op for path, op in handle.report.replaced.items() if "mlp" not in path}
    blocks = ("blocks.0", "blocks.0.attn", "blocks.1", "blocks.1.attn", "final_layer")
    assert taken == {path: "qk_norm" if "attn" in path else "adaln" for path in blocks}
    check_fifty_steps(model, patched, loss)


@loop_over("variant", VARIANTS)
def test_bf16_autocast_trains_alike(variant):
    model, patched = pair(variant)
    patch.apply(patched, ops=patch.OPS)
    check_bf16_autocast(model, patched, loss)


@loop_over("variant", VARIANTS)
def test_fp64_gradients_of_every_parameter(variant):
    model, patched = (module.double() for module in pair(variant))
    patch.apply(patched, ops=patch.OPS)
    for module in (model.eval(), patched.eval()):
        loss_of(module(*inputs(dtype=torch.float64))).backward()
    for (name, ours), theirs in zip(patched.named_parameters(), model.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(("rope", "fused"), [(Rope, True), (HalvesRope, False)])
def test_tables_go_to_the_op_only_where_they_mean_the_same(monkeypatch, rope, fused):
    """A module that turns other channels together is called as it is; so is one with hooks."""
    model, patched = (one.eval() for one in pair("qknorm", rope))
    patch.apply(patched, ops=patch.OPS)
    real, given = published.qk_norm, []

    def seen(*arguments):
        given.append(arguments[-1] is not None)
        return real(*arguments)

    monkeypatch.setattr(published, "qk_norm", seen)
    torch.testing.assert_close(patched(*inputs()), model(*inputs()), rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(patched)
    copied(*inputs())
    assert given == 4 * [fused]
    patched.feat_rope.register_forward_hook(lambda *_: None)
    patched(*inputs())
    assert given[4:] == 2 * [False]
