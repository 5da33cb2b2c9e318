"""Small models with the module names, shapes and forward order of the published code, written for these tests."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm=False, drop=0.0):
        super().__init__()
        self.num_heads, self.scale, self.fused_attn = heads, (width // heads) ** -0.5, True
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(n, t, d)))


class Mlp(nn.Module):
    def __init__(self, width, drop=0.0, approximate="tanh"):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate=approximate)
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(4 * width, width)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        parts = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + parts[2].unsqueeze(1) * self.attn(modulate(self.norm1(x), parts[0], parts[1]))
        return x + parts[5].unsqueeze(1) * self.mlp(modulate(self.norm2(x), parts[3], parts[4]))


class SwappedBlock(Block):
    """Scale before shift: the same modules, another function."""

    def forward(self, x, c):
        parts = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + parts[2].unsqueeze(1) * self.attn(modulate(self.norm1(x), parts[1], parts[0]))
        return x + parts[5].unsqueeze(1) * self.mlp(modulate(self.norm2(x), parts[3], parts[4]))


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Conv2d(4, width, 2, 2)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = t[:, None] * 10.0 ** -torch.arange(8, device=t.device, dtype=t.dtype)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        self.classes = classes

    def forward(self, labels, train):
        if train:
            drop = torch.rand(labels.shape[0], device=labels.device) < 0.1
            labels = torch.where(drop, self.classes, labels)
        return self.embedding_table(labels)


class SkipNorm(nn.LayerNorm):
    """In float32 (float64 for float64) whatever comes in, and out in the dtype that came in."""

    def forward(self, joined):
        wide = torch.promote_types(joined.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(joined.to(wide), self.normalized_shape, weight, bias, self.eps).to(joined.dtype)


class SkipLinear(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, joined, x):
        return self.linear(joined)


class Transformer(nn.Module):
    """kind: "sit" and "dit" (a tensor), "repa" (output, features), "input" and "output" (DiverseDiT, a dict).

    DiverseDiT's dict has the features of all blocks if block_diversity_loss, in later versions only in train mode.
    """

    checkpoints = False

    def __init__(self, kind="sit", width=32, depth=4, heads=4, qk_norm=False, block=Block, later=False):
        super().__init__()
        self.kind, self.encoder_depth = kind, 2
        self.block_diversity_loss, self.later = True, later
        out = 8 if kind == "dit" else 4
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 16, width), requires_grad=False)
        if kind in ("input", "output"):
            self.skip_linears = nn.ModuleList(SkipLinear(width) for _ in range(depth // 2))
            self.skip_norms = nn.ModuleList(SkipNorm(2 * width, eps=1e-6) for _ in range(depth // 2))
        self.x_embedder = PatchEmbed(width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(10, width)
        self.blocks = nn.ModuleList(block(width, heads, qk_norm) for _ in range(depth))
        if kind not in ("sit", "dit"):
            self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, 12))])
        self.final_layer = FinalLayer(width, 4 * out)

    def unpatchify(self, x):
        n = x.shape[0]
        return x.view(n, 4, 4, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, 8, 8)

    def fuse(self, k, x, skip):
        return self.skip_linears[k](self.skip_norms[k](torch.cat([x, skip], dim=-1)), x)

    def forward(self, x, t, y, return_logvar=False):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        half, stack, features, zs = len(self.blocks) // 2, [], {}, None
        for b, block in enumerate(self.blocks):
            if self.kind == "input" and b < half:
                stack.append(x)
            if self.kind == "input" and b >= half:
                x = self.fuse(b - half, x, stack.pop())
            x = checkpoint(block, x, c, use_reentrant=False) if self.checkpoints else block(x, c)
            if self.kind == "output" and b >= half:
                x = self.fuse(b - half, x, stack.pop())
            if self.kind == "output" and b < half:
                stack.append(x)
            features[b] = x
            if b + 1 == self.encoder_depth and hasattr(self, "projectors"):
                n, tokens, width = x.shape
                zs = [project(x.reshape(-1, width)).reshape(n, tokens, -1) for project in self.projectors]
        out = self.unpatchify(self.final_layer(x, c))
        if self.kind in ("input", "output"):
            collected = self.block_diversity_loss and (self.training or not self.later)
            return {"x": out} | ({"block_feas": features} if collected else {}) | {"zs": zs}
        return (out, zs) if self.kind == "repa" else out


KINDS = ("sit", "dit", "repa", "input", "output")


def inputs(samples=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, 8, 8, generator=generator, dtype=dtype)
    return x, torch.rand(samples, generator=generator, dtype=dtype), torch.arange(samples) % 10


def leaves(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [leaf for entry in (result.values() if isinstance(result, dict) else result) for leaf in leaves(entry)]


LOSS_TOLERANCE = 1e-5  # relative, at each of 50 fp32 steps
WEIGHT_TOLERANCE = 1e-4  # of the norm of all weights, after them; Adam lifts rounding where gradients are near 0
BF16_TOLERANCE = 5e-3  # of the norm of the curve of 50 losses, autocast; eager bf16 is 0.6e-3 to 1.3e-3 off eager fp32


def losses_of(model, loss, bf16=False):
    """The losses of 50 steps of AdamW; loss(model, number of the batch)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1)
    losses = []
    for step in range(50):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model, step % 3)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return torch.tensor(losses)


def check_fifty_steps(model, patched, loss):
    """The same losses at every step, and the same weights in the end."""
    losses = losses_of(model, loss)
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(losses_of(patched, loss), losses, rtol=LOSS_TOLERANCE, atol=0)
    ours, theirs = (torch.cat([p.detach().double().flatten() for p in one.parameters()]) for one in (patched, model))
    assert (ours - theirs).norm() <= WEIGHT_TOLERANCE * theirs.norm()


def check_bf16_autocast(model, patched, loss):
    ours, theirs = (losses_of(one, loss, bf16=True) for one in (patched, model))
    assert (ours - theirs).norm() <= BF16_TOLERANCE * theirs.norm()


def loss_of(result):
    return sum((leaf.float() if leaf.dtype == torch.bfloat16 else leaf).square().mean() for leaf in leaves(result))
