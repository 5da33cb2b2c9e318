import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dit_fast.errors import ConfigError
from dit_fast.nn import attention as attention_module
from dit_fast.nn.attention import Attention
from dit_fast.nn.block import Block
from dit_fast.nn.embeddings import PatchEmbed, TimestepEmbedder, sincos_position_embedding
from dit_fast.nn.final_layer import FinalLayer
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close


def _randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return module


def test_patch_embedding_reads_channels_slowest_and_rows_outer():
    embed = PatchEmbed(3, 2, 5)
    weight = _randomise(embed).proj.weight.detach()
    x = torch.randn(2, 3, 6, 6)
    tokens = embed(x)
    assert tokens.shape == (2, 9, 5)
    patch = x[1, :, 2:4, 4:6].reshape(-1)  # second row of patches, third column
    assert_close(tokens[1, 1 * 3 + 2], weight.view(5, -1) @ patch + embed.proj.bias, 1e-6)
    assert_close(embed(x.to(memory_format=torch.channels_last)), tokens, 1e-6)
    assert_close(embed(x.transpose(2, 3).contiguous().transpose(2, 3)), tokens, 1e-6)


def test_position_embedding_needs_a_multiple_of_four():
    with pytest.raises(ConfigError, match="hidden_size 30"):
        sincos_position_embedding(30, (4, 4))


def test_time_embedding_keeps_its_precision_in_half_models():
    t = torch.tensor([0.3, 0.30001])
    frequencies = TimestepEmbedder.frequencies(t)
    assert (frequencies[0] - frequencies[1]).abs().max() > 1e-6
    assert TimestepEmbedder.frequencies(t.bfloat16()).dtype == torch.float32
    assert TimestepEmbedder.frequencies(torch.tensor([3])).dtype == torch.float32
    embedder = TimestepEmbedder(8).bfloat16()
    assert embedder(t).dtype == torch.bfloat16


@loop_over("qk_norm", [False, True])
def test_attention_matches_the_equation_and_plain_products(qk_norm):
    module = _randomise(Attention(12, 3, qk_norm, "sdpa")).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = torch.empty(2, 5, 12, dtype=torch.float64)
    projected = module.qkv(x)
    for head in range(3):
        columns = slice(head * 4, head * 4 + 4)
        query, key, value = (projected[..., start:][..., columns] for start in (0, 12, 24))
        query, key = module.q_norm(query), module.k_norm(key)
        scores = (query @ key.transpose(1, 2)) / math.sqrt(4)
        expected[..., columns] = scores.softmax(-1) @ value
    expected = module.proj(expected)
    assert_close(module(x), expected, 1e-12)
    module.kind = "math"
    assert_close(module(x), expected, 1e-12)
    if qk_norm:
        assert module.q_norm.eps == module.k_norm.eps == 1e-5


def test_attention_of_any_kind_has_a_forward_mode():
    module = _randomise(Attention(8, 2, True)).double()
    x, direction = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    _, tangent = torch.func.jvp(module, (x,), (direction,))
    numeric = (module(x + 1e-6 * direction) - module(x - 1e-6 * direction)) / 2e-6
    assert_close(tangent, numeric, 1e-7)


def test_flash_attention_is_an_error_where_it_is_absent_and_never_a_fallback(monkeypatch):
    monkeypatch.setattr(attention_module, "flash_attention", lambda: (None, "not installed"))
    with pytest.raises(ConfigError, match="not installed"):
        Attention(8, 2, kind="flash")
    assert Attention(8, 2, kind="auto")(torch.randn(1, 3, 8)).shape == (1, 3, 8)

    def installed(*_):
        raise AssertionError("flash-attn was called with tensors it does not take")

    monkeypatch.setattr(attention_module, "flash_attention", lambda: (installed, ""))
    assert Attention(8, 2, kind="auto")(torch.randn(1, 3, 8)).shape == (1, 3, 8)
    with pytest.raises(ConfigError, match="cuda"):
        Attention(8, 2, kind="flash")(torch.randn(1, 3, 8))


def test_the_gradients_of_query_key_and_value_are_put_into_one_buffer_once():
    seen = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            seen.extend([name] if name in ("stack", "cat", "clone", "copy_", "_to_copy", "contiguous") else [])
            return func(*args, **(kwargs or {}))

    output = Attention(16, 2)(torch.randn(2, 5, 16, requires_grad=True))
    with Copies():
        output.sum().backward()
    assert seen == ["stack"]


def test_bad_attention_arguments():
    with pytest.raises(ConfigError, match="num_heads 3"):
        Attention(8, 3)
    with pytest.raises(ConfigError, match="auto, sdpa, flash, math"):
        Attention(8, 2, kind="fast")


def test_block_matches_its_equations_and_the_order_of_its_modulation():
    block = _randomise(Block(8, 2)).double()
    x, c = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    modulation = block.adaLN_modulation[1](torch.nn.functional.silu(c))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (part[:, None] for part in modulation.split(8, dim=1))

    def norm(z):
        return torch.nn.functional.layer_norm(z, (8,), eps=1e-6)

    expected = x + gate_a * block.attn(norm(x) * (1 + scale_a) + shift_a)
    hidden = block.mlp.fc1(norm(expected) * (1 + scale_m) + shift_m)
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    expected = expected + gate_m * block.mlp.fc2(gelu)
    assert_close(block(x, c)[0], expected, 1e-12)


def test_a_new_block_is_the_identity_and_one_gate_opens_one_branch():
    block = Block(8, 2)
    x, c = torch.randn(2, 3, 8), torch.randn(2, 8)
    assert torch.equal(block(x, c)[0], x)
    block.adaLN_modulation[1].bias.data[2 * 8 : 3 * 8] = 1  # the attention gate
    nn.init.constant_(block.mlp.fc2.bias, 5.0)  # would show if the MLP branch were open
    normed = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    assert_close(block(x, c)[0], x + block.attn(normed), 1e-6)


def test_final_layer_starts_at_zero():
    layer = FinalLayer(8, 2, 3)
    assert layer(torch.randn(2, 4, 8), torch.randn(2, 8)).abs().max() == 0
