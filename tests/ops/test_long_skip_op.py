"""The long skip's analytic gradient, dtypes, strides and statistics: "gemm", and "triton" where it can run."""

import importlib
import itertools

import pytest
import torch

from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import RowStatistics, long_skip, row_statistics
from dit_fast.ops.long_skip import Folded, backward_op, forward_op
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close
from tests.helpers.long_skip_cases import (
    INTERPRETED,
    NAMES,
    autocast,
    errors,
    everything,
    inputs,
    stressed,
    upstream_like,
)
from tests.helpers.long_skip_cases import backend as backend

HALF = (torch.bfloat16, torch.float16)


def test_analytic_gradients_in_float64():
    for rows, width in [((2, 5), 6), ((1,), 1), ((3, 7), 2), ((2, 1, 4), 5), ((130,), 33)]:
        tensors, upstream = inputs(rows, width), upstream_like((*rows, width))
        sides = [everything(tensors, upstream, backend=name, eps=1e-3) for name in ("gemm", "torch")]
        for ours, expected in zip(*sides, strict=True):
            assert ours.dtype == torch.float64
            assert_close(ours, expected, 1e-12, extra=1e-13)


def test_odd_addresses_and_strides(backend):
    """Bulk copies need rows at whole 16 bytes."""
    tensors, upstream = [x.bfloat16() for x in inputs((6,), 16)], upstream_like((6, 16), torch.bfloat16)
    expected = everything(tensors, upstream, backend=backend)
    buffer = torch.full((7, 19), torch.nan, dtype=torch.bfloat16)
    for place in (buffer.view(-1)[1:97].view(6, 16), buffer[1:, 2:18], buffer.view(-1)[: 6 * 16].view(16, 6).T):
        for moved in (upstream, *tensors[:2]):
            place.copy_(moved)
            leaves = [(place if x is moved else x).detach().requires_grad_() for x in tensors]
            y = long_skip(*leaves, backend=backend)
            ours = [y, *torch.autograd.grad(y, leaves, place if moved is upstream else upstream)]
            assert all(torch.equal(x, same) for x, same in zip(ours, expected, strict=True))


@loop_over("kind", ["plain", "mean 100", "massive"])
def test_float32_error_is_at_most_that_of_eager(kind):
    """1e-6 on plain inputs; in all cases within 1.25 times eager's against fp64 (kernels.md section 7)."""
    tensors = [x.float() for x in stressed(kind, inputs((300,), 48))]
    upstream = upstream_like((300, 48), torch.float32)
    exact = everything([x.double() for x in tensors], upstream, backend="torch")
    ours, eager = (errors(everything(tensors, upstream, backend=name), exact) for name in ("gemm", "torch"))
    for name, error, allowed in zip(NAMES, ours, eager, strict=True):
        assert error <= max(1.25 * allowed, 1e-6), (name, error, allowed)


STREAMS = (
    ["half half", "fp32 half"] if INTERPRETED else ["half half", "fp32 half", "half fp32", "fp32 fp32", "bf16 fp16"]
)


@loop_over("streams", STREAMS)
def test_half_precision_error_is_at_most_that_of_eager(backend, streams):
    """y and all six gradients within 1.25 times eager's error, for every mix of dtypes.

    fp32 weights under autocast, or bf16 weights without it. Interpreted kernels take long: their own tests have the
    other mixes.
    """
    casts = [None, torch.bfloat16] if INTERPRETED else [None, *HALF]
    for cast, kind in itertools.product(casts, ["mean 100"] if INTERPRETED else ["plain", "mean 100", "massive"]):
        if not (cast and streams == "bf16 fp16"):  # autocast's concatenation refuses the pair
            check_half_precision(backend, kind, streams, cast)


def check_half_precision(backend, kind, streams, cast):
    rows, seeds = (32, 1) if INTERPRETED else (128, 3)
    half = cast or torch.bfloat16
    of = {"half": half, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtypes = [of[name] for name in streams.split()] + 4 * [torch.float32 if cast else half]
    sides = []
    for seed in range(seeds):
        tensors = [
            x.to(dtype) for x, dtype in zip(stressed(kind, inputs((rows,), 128, seed=seed)), dtypes, strict=True)
        ]
        upstream = upstream_like((rows, 128), half, 10 + seed)
        exact = everything([x.double() for x in tensors], upstream, backend="torch")
        ours = everything(tensors, upstream, cast, backend=backend)
        assert [x.dtype for x in ours] == [half, *dtypes]
        eager = everything(tensors, upstream, cast, backend="torch")
        sides.append((errors(ours, exact), errors(eager, exact)))
    both = torch.tensor(sides, dtype=torch.float64).square().mean(0).sqrt()
    for name, error, allowed in zip(NAMES, *both.tolist(), strict=True):
        assert error <= 1.25 * allowed + 1e-6, (kind, cast, name, error, allowed)
    assert both[0].max() < (6e-3 if half == torch.bfloat16 else 1e-3)


def test_only_the_gradients_that_are_needed(backend):
    tensors, upstream = inputs((4, 3), 16, torch.float32), upstream_like((4, 3, 16), torch.float32)
    if backend == "triton":
        tensors, upstream = [x.bfloat16() for x in tensors], upstream.bfloat16()
    expected = everything(tensors, upstream, backend=backend)
    for wanted in ((0,), (1,), (2,), (3,), (4,), (5,), (0, 4), (1, 2, 5), ()):
        leaves = [x.clone().requires_grad_(index in wanted) for index, x in enumerate(tensors)]
        y = long_skip(*leaves, backend=backend)
        assert y.requires_grad == bool(wanted)
        if wanted:
            grads = torch.autograd.grad(y, [leaves[index] for index in wanted], upstream)
            for index, grad in zip(wanted, grads, strict=True):
                assert torch.equal(grad, expected[1 + index]), (wanted, index)


@pytest.mark.parametrize("backend", ["torch", "gemm"])
def test_a_result_in_another_dtype_is_the_maps_converted(backend):
    tensors = [tensor.requires_grad_() for tensor in inputs((7,), 6, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y, wide = (long_skip(*tensors, backend=backend, out_dtype=dtype) for dtype in (None, torch.float32))
    assert (y.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(wide, y.float())
    upstream = torch.randn(y.shape).bfloat16()
    grads = [torch.autograd.grad(*pair) for pair in ((y, tensors, upstream), (wide, tensors, upstream.float()))]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    for odd in (torch.int32, torch.float8_e4m3fn, "bf16"):
        with pytest.raises(UserError, match="out_dtype must be"):
            long_skip(*tensors, out_dtype=odd)


def test_unneeded_gradients_are_not_computed():
    tensors = inputs((7,), 5, torch.float32)
    y, mean, rstd = forward_op(*tensors, *[None] * 7, 1e-6, torch.float32, torch.float32, "gemm")
    needs = [False, True, False, False, True, False]
    grads = backward_op(torch.ones_like(y), y, mean, rstd, *tensors, *[None] * 3, torch.float32, needs, "gemm")
    assert [g.shape for g in grads] == [tensors[1].shape, tensors[4].shape]


def test_kept_folded_weights_change_no_bit_and_follow_a_write(backend):
    x, skip, *parameters = [tensor.requires_grad_() for tensor in inputs((7,), 16, torch.float32)]

    def results():
        with torch.autocast("cpu", torch.bfloat16):
            y = long_skip(x, skip, *parameters, backend=backend)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, skip, *parameters))

    weight = parameters[2]
    for _ in range(2):
        bare, weight.folded = results(), Folded(*parameters)
        assert all(torch.equal(*pair) for pair in zip(results(), bare, strict=True))
        with torch.no_grad():
            parameters[0].mul_(0.5)
        kept = results()
        del weight.folded
        assert all(torch.equal(*pair) for pair in zip(kept, results(), strict=True))


def _strided(tensors):
    x, skip, *parameters = tensors
    stretched = torch.stack([x, x], -1)[..., 0]
    sliced = torch.cat([skip, skip], -1)[..., skip.shape[-1] :]
    norm_weight, norm_bias, weight, bias = parameters
    return [stretched, sliced, torch.stack([norm_weight] * 2, -1)[:, 0], norm_bias, weight.T.contiguous().T, bias]


def test_strided_and_expanded_inputs(backend):
    tensors = inputs((4, 6), 16, torch.bfloat16)
    upstream = upstream_like((4, 6, 16))
    expected = everything(tensors, upstream, backend=backend)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = long_skip(*_strided(leaves), backend=backend)
    grads = torch.autograd.grad(y, leaves, upstream.bfloat16())
    for ours, theirs in zip((y, *grads), expected, strict=True):
        assert_close(ours, theirs, 4e-3)
    row = tensors[0][:1, :1].expand(4, 6, 16)
    plain = [row.contiguous(), *tensors[1:]]
    assert torch.equal(long_skip(row, *tensors[1:], backend=backend), long_skip(*plain, backend=backend))


def test_strided_and_expanded_gradients(backend):
    tensors = inputs((4, 6), 16, torch.bfloat16)
    for use in (
        lambda y: y.sum(),
        lambda y: y[..., 0].sum(),
        lambda y: (y.transpose(0, 1)[1:] * torch.arange(16)).sum(),
        lambda y: (torch.cat([y, y * 2], -1)[..., 3:11] ** 2).sum(),
        lambda y: (y.float().to(torch.float64) ** 2).sum(),
    ):
        sides = []
        for name, dtype in ((backend, torch.bfloat16), ("torch", torch.float64)):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
            sides.append(torch.autograd.grad(use(long_skip(*leaves, backend=name)), leaves))
        for ours, expected in zip(*sides, strict=True):
            assert_close(ours, expected, 2e-2)


def test_statistics_of_the_caller(backend):
    """They replace the op's own, carry no gradient of theirs, and change no gradient; "torch" ignores them."""
    tensors = [x.bfloat16() for x in inputs((3, 4), 16)]
    upstream = upstream_like((3, 4, 16))
    given = {"x_stats": row_statistics(tensors[0]), "skip_stats": row_statistics(tensors[1])}
    for options in (given, {"x_stats": given["x_stats"]}, {"skip_stats": given["skip_stats"]}):
        for ours, expected in zip(
            everything(tensors, upstream, backend=backend, **options),
            everything(tensors, upstream, backend=backend),
            strict=True,
        ):
            assert torch.equal(ours, expected)
    wrong = RowStatistics(given["x_stats"].mean + 1, given["x_stats"].variance)
    assert not torch.equal(long_skip(*tensors, backend=backend, x_stats=wrong), long_skip(*tensors, backend=backend))
    assert torch.equal(long_skip(*tensors, backend="torch", x_stats=wrong), long_skip(*tensors, backend="torch"))


def test_statistics_that_do_not_fit_are_named():
    tensors = inputs((3, 4), 16, torch.float32)
    s = row_statistics(tensors[0])
    for named, given in (
        ("x_stats.mean", (s.mean[0], s.variance)),
        ("x_stats.variance", (s.mean, s.variance.bfloat16())),
        ("x_stats.variance", (s.mean, s.variance.to("meta"))),
    ):
        with pytest.raises(UserError, match=named) as caught:
            long_skip(*tensors, backend="gemm", x_stats=RowStatistics(*given))
        assert "\n" not in str(caught.value)


def test_backward_inside_autocast(backend):
    """Autocast decides the dtype of the map when the forward runs, and nothing in the backward."""
    for cast in HALF if backend == "triton" else (None, *HALF):  # the kernels have no products in float32
        leaves = [x.clone().requires_grad_() for x in inputs((6,), 16, torch.float32)]
        with autocast(cast):
            y = long_skip(*leaves, backend=backend)
        assert y.dtype == (cast or torch.float32)
        with autocast(torch.bfloat16):
            inside = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
        outside = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
        assert [g.dtype for g in inside] == [torch.float32] * 6


def test_empty_batch(backend):
    tensors = [x.bfloat16() for x in inputs((0, 3), 16)]
    grads = everything(tensors, torch.empty(0, 3, 16), backend=backend)
    assert [g.shape for g in grads] == [x.shape for x in (tensors[0], *tensors)]
    assert all(not g.any() for g in grads[3:])


def test_twice_gives_the_same_bits(backend):
    tensors = [x.bfloat16() for x in inputs((70,), 16)]
    first, second = (everything(tensors, upstream_like((70, 16)), backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_a_backend_cannot_take():
    x, skip, *parameters = inputs((4,), 16, torch.float32)
    with pytest.raises(ConfigError, match="backend 'gemm' cannot run: float64 and other dtypes are mixed"):
        long_skip(x, skip.double(), *parameters, backend="gemm")
    with pytest.raises(ConfigError, match="backend 'triton' cannot run"):
        long_skip(x.double(), skip.double(), *(p.double() for p in parameters), backend="triton")


def test_auto_runs_the_reference_where_it_is_exact_or_faster(monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("dit_fast.ops.long_skip"), "_fused", lambda *x: pytest.fail("the op ran")
    )
    for dtype in (torch.float64, torch.float32):
        tensors = inputs((4,), 16, dtype)
        assert torch.equal(long_skip(*tensors), long_skip(*tensors, backend="torch"))


def test_weights_of_16_bits_are_not_rounded_again():
    """Folding gamma into them would be a rounding that the released order of operations does not have."""
    tensors = [x.bfloat16() for x in inputs((256,), 128)]
    exact = long_skip(*(x.double() for x in tensors), backend="torch")
    ours, eager = (errors([long_skip(*tensors, backend=name)], [exact])[0] for name in ("gemm", "torch"))
    assert ours <= 1.05 * eager
