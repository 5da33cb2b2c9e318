import pytest
import torch
import torch.nn.functional as F

from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import long_skip
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close


def _inputs(shape=(2, 5, 6), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    sizes = [shape, shape, (2 * width,), (2 * width,), (width, 2 * width), (width,)]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    tensors[2] = tensors[2] + 1
    return [tensor.to(dtype) for tensor in tensors]


def _by_hand(x, skip, norm_weight, norm_bias, weight, bias, eps=1e-6):
    """The equation, without a LayerNorm or Linear of torch."""
    joined = torch.cat([x, skip], -1)
    centred = joined - joined.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return torch.einsum("...i,oi->...o", normalised * norm_weight + norm_bias, weight) + bias


@loop_over("shape", [(2, 5, 6), (1, 1, 2), (3, 7), (2, 3, 4, 5)])
def test_matches_the_equation(shape):
    inputs = _inputs(shape)
    assert_close(long_skip(*inputs), _by_hand(*inputs), 1e-13)
    assert_close(long_skip(*_inputs(shape, torch.float32)), _by_hand(*inputs), 1e-6)


def test_order_of_concatenation_is_stream_then_skip():
    x, skip, *rest = _inputs()
    assert (long_skip(x, skip, *rest) - long_skip(skip, x, *rest)).abs().max() > 0.1


def test_gradients_and_forward_mode():
    inputs = [tensor.requires_grad_() for tensor in _inputs((2, 3, 4))]
    assert torch.autograd.gradcheck(long_skip, inputs, check_forward_ad=True)


def test_strided_inputs():
    x, skip, norm_weight, norm_bias, weight, bias = _inputs((4, 5, 6))
    expected = long_skip(x, skip, norm_weight, norm_bias, weight, bias)
    strided = torch.stack([x, x], -1)[..., 0]
    permuted = skip.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert not permuted.is_contiguous()
    ours = long_skip(strided, permuted, norm_weight, norm_bias, weight.t().contiguous().t(), bias)
    assert_close(ours, expected, 1e-13)
    assert_close(long_skip(x[::2, 1:], skip[::2, 1:], norm_weight, norm_bias, weight, bias), expected[::2, 1:], 1e-13)


def test_statistics_are_taken_in_fp32_for_half_precision():
    """A mean of 64 on a spread of 1: bf16 statistics would lose the spread, fp32 ones keep it."""
    x, skip, norm_weight, norm_bias, weight, bias = _inputs((2, 5, 8), torch.float32)
    x, skip = (x + 64).bfloat16(), (skip + 64).bfloat16()
    half = [tensor.bfloat16() for tensor in (norm_weight, norm_bias, weight, bias)]
    ours = long_skip(x, skip, *half)
    assert ours.dtype == torch.bfloat16
    assert_close(ours, _by_hand(x.double(), skip.double(), *(tensor.double() for tensor in half)), 1e-2)


def test_mixed_dtypes_promote_before_the_norm():
    x, skip, *rest = _inputs((2, 5, 8), torch.float32)
    for pair in ((x, skip.bfloat16()), (x.bfloat16(), skip)):
        ours = long_skip(*pair, *rest)
        assert ours.dtype == torch.float32
        assert_close(ours, _by_hand(*(tensor.double() for tensor in (*pair, *rest))), 1e-6)


def test_autocast_runs_the_map_in_half_precision():
    inputs = _inputs((2, 5, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = long_skip(*inputs)
    assert ours.dtype == torch.bfloat16
    normalised = F.layer_norm(torch.cat(inputs[:2], -1), (16,), *inputs[2:4], 1e-6).bfloat16()
    assert_close(ours, F.linear(normalised, inputs[4].bfloat16(), inputs[5].bfloat16()), 1e-2)


def test_eps_reaches_the_norm():
    x, skip, *rest = _inputs()
    assert_close(long_skip(x, skip, *rest, eps=0.5), _by_hand(x, skip, *rest, eps=0.5), 1e-13)


@loop_over(
    ("position", "replacement", "named"),
    [
        (1, torch.zeros(2, 5, 7), "skip"),
        (2, torch.zeros(6), "norm_weight"),
        (3, torch.zeros(13), "norm_bias"),
        (4, torch.zeros(12, 6), "weight"),
        (5, torch.zeros(12), "bias"),
        (0, torch.zeros(2, 5, 6, dtype=torch.int64), "x must be floating"),
        (1, torch.zeros(2, 5, 6, device="meta"), "skip is on meta"),
    ],
)
def test_bad_input_is_one_line_that_names_it(position, replacement, named):
    inputs = _inputs(dtype=torch.float32)
    inputs[position] = replacement
    with pytest.raises(UserError, match=named) as caught:
        long_skip(*inputs)
    assert "\n" not in str(caught.value)


def test_unknown_backend_lists_the_valid_ones():
    with pytest.raises(ConfigError, match="cudnn") as caught:
        long_skip(*_inputs(), backend="cudnn")
    assert "auto" in str(caught.value)
    assert "torch" in str(caught.value)
    assert_close(long_skip(*_inputs(), backend="torch"), long_skip(*_inputs()), 0.0)


def test_compiles_without_graph_breaks():
    inputs = _inputs(dtype=torch.float32)
    compiled = torch.compile(long_skip, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), long_skip(*inputs), 1e-6)
