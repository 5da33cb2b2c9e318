"""Statistics of rows: accuracy, joining, and what they refuse."""

import itertools
import os

import pytest
import torch

from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import RowStatistics, row_statistics
from dit_fast.ops.row_statistics import join, row_statistics_op
from tests.helpers.golden import assert_close

BACKENDS = ["triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"]  # test_interpreter.py sets it


def rows(shape, dtype, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_and_population_variance(backend):
    """1e-6 of the row as it is stored, also where its mean is 100 deviations."""
    shapes, means = [(5, 7, 33), (1,), (4, 1152), (3, 1), (2, 0, 8)], (0.0, 100.0)
    for shape, mean, dtype in itertools.product(shapes, means, [torch.float32, torch.bfloat16, torch.float16]):
        x = rows(shape, dtype, mean)
        ours = row_statistics(x, backend)
        assert isinstance(ours, RowStatistics)
        assert ours.mean.dtype == ours.variance.dtype == torch.float32
        assert_close(ours.mean, x.double().mean(-1), 1e-7, extra=1e-7)
        assert_close(ours.variance, x.double().var(-1, correction=0), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_of_many_deviations_keeps_the_variance(backend):
    """A mean of 20 000 deviations: E[x^2] - mean^2 would have lost all digits."""
    x = (100 + torch.arange(64) % 2 * 0.01).float()[None]
    assert_close(row_statistics(x, backend).variance, x.double().var(-1, correction=0), 1e-3)


def test_float64_stays_float64():
    x = rows((3, 9), torch.float64, 1e6)
    ours = row_statistics(x)
    assert ours.mean.dtype == ours.variance.dtype == torch.float64
    assert_close(ours.variance, x.var(-1, correction=0), 1e-9)
    with pytest.raises(ConfigError, match="backend 'triton' cannot run"):
        row_statistics(x, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_joined_statistics_are_those_of_the_concatenation(backend):
    for gap in (0.0, 3.0, 1e4):
        x, skip = rows((40, 48), torch.float32), 5 * rows((40, 48), torch.float32, gap, seed=1)
        mean, rstd = join(row_statistics(x, backend), row_statistics(skip, backend), 1e-6)
        both = torch.cat([x, skip], 1).double()
        assert_close(mean, both.mean(1), 1e-6)
        assert_close(rstd, (both.var(1, correction=0) + 1e-6).rsqrt(), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows(backend):
    wide = rows((6, 40), torch.bfloat16)
    for x in (wide[:, 3:20], wide[:, ::2], wide.T, wide[:1].expand(6, 40), wide.view(2, 3, 40).transpose(0, 1)):
        for ours, expected in zip(row_statistics(x, backend), row_statistics(x.contiguous(), backend), strict=True):
            assert_close(ours, expected, 1e-6)


def test_they_carry_no_gradient_in_either_mode():
    x = rows((3, 4), torch.float64).requires_grad_()
    assert not any(part.requires_grad for part in row_statistics(x))
    value, tangent = torch.func.jvp(lambda x: row_statistics(x).mean * x.sum(-1), (x.detach(),), (torch.ones(3, 4),))
    assert_close(tangent, 4 * x.mean(-1), 1e-12)
    assert value.shape == (3,)


def test_what_is_not_rows_is_named():
    for x in (torch.tensor(1.0), torch.ones(3, 0), torch.ones(3, 4, dtype=torch.int64)):
        with pytest.raises(UserError, match="row_statistics: x must be ") as caught:
            row_statistics(x)
        assert "\n" not in str(caught.value)


def test_opcheck_and_compile():
    for dtype in (torch.bfloat16, torch.float64):
        torch.library.opcheck(row_statistics_op.registered, (rows((5, 6), dtype), "torch"))
    torch._dynamo.reset()
    compiled = torch.compile(row_statistics, fullgraph=True, backend="aot_eager")
    x = rows((2, 5, 6), torch.float32)
    for ours, expected in zip(compiled(x), row_statistics(x), strict=True):
        assert torch.equal(ours, expected)
