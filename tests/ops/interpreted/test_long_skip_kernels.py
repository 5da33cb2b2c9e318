"""The long skip's kernels against float64 on equally rounded inputs: offsets, outliers, mixed types, odd sizes."""

import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dit_fast import ops
from dit_fast.backend import force
from dit_fast.kernels import (
    long_skip,
    long_skip_backward,
    long_skip_forward,
    long_skip_rows,
    long_skip_tiles,
    row_statistics,
)
from dit_fast.ops import traced
from dit_fast.ops.long_skip import Folded
from dit_fast.ops.long_skip_node import fuses
from dit_fast.ops.long_skip_rows import project

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-6, FP16: 1e-3, BF16: 6e-3}  # relative RMS error
DTYPES = [(BF16, BF16, BF16), (FP16, FP16, FP16), (FP32, BF16, BF16), (BF16, FP32, BF16), (BF16, FP16, FP16)]
EPS = 1e-6


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def rows(count, width, dtype, kind="plain", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    if kind == "offset":  # mean of a row = 100 standard deviations
        x += 100 * torch.where(torch.rand(count, 1, generator=generator) < 0.5, -1, 1)
    if kind == "massive":
        x[:, :: width // 4] *= 1000
    return x.to(dtype)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "offset", "massive"])
@pytest.mark.parametrize("shape", [(1, 1), (37, 192), (9, 1152), (2, 4104)], ids=str)
def test_row_statistics(shape, kind, dtype):
    x = rows(*shape, dtype, kind if shape[1] > 4 else "plain")
    mean, variance = row_statistics.row_statistics(x)
    wide = x.double()
    assert mean.dtype == variance.dtype == FP32
    assert error(mean, wide.mean(1)) < 1e-6
    spread = wide.var(1, correction=0)
    assert error(variance, spread) < 1e-6 if spread.norm() else not variance.any()


def test_row_statistics_of_strided_rows_read_nothing_else():
    base = torch.full((11, 80), torch.nan)
    base[:, 7:71] = rows(11, 64, FP32)
    mean, variance = row_statistics.row_statistics(base[:, 7:71])
    assert error(mean, base[:, 7:71].double().mean(1)) < 1e-6
    assert error(variance, base[:, 7:71].double().var(1, correction=0)) < 1e-6
    assert all(part.shape == (0,) for part in row_statistics.row_statistics(base[:0]))
    assert "contiguous" in row_statistics.supports(base.T)[0]
    assert "float64" in row_statistics.supports(base.double())[0]


class Problem:
    """One long skip: the inputs as the kernels take them, and the exact result of the same rounded inputs."""

    def __init__(self, count, width, dtypes, kind="plain", other="plain", fp32_weights=True):
        x_dtype, skip_dtype, self.dtype = dtypes
        self.x, self.skip = rows(count, width, x_dtype, kind, 1), rows(count, width, skip_dtype, other, 2)
        generator = torch.Generator().manual_seed(3)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.gamma, self.beta = 1 + draw(2 * width) / 4, draw(2 * width) / 4
        self.weight, self.bias = draw(width, 2 * width) / (2 * width) ** 0.5, draw(width) / 4
        if not fp32_weights:
            self.weight, self.gamma = self.weight.to(self.dtype), self.gamma.to(self.dtype)
        self.grad = draw(count, width).to(self.dtype)

    def statistics(self):
        joined = torch.cat([self.x.double(), self.skip.double()], 1)
        mean = joined.mean(1, keepdim=True)
        return mean[:, 0].float(), ((joined - mean).square().mean(1) + EPS).rsqrt().float()

    def fold(self):
        return long_skip.fold(self.gamma, self.beta, self.weight, self.bias, self.dtype)

    def ours(self, out_dtype=None):
        self.mean, self.rstd = self.statistics()
        self.folded = self.fold()
        return project(self.x, self.skip, self.mean, self.rstd, *self.folded, out_dtype or self.dtype)

    def reference(self, wide, normalised=lambda z: z, weight=lambda w: w):
        x, skip = self.x.to(wide).requires_grad_(), self.skip.to(wide).requires_grad_()
        joined = torch.cat([x, skip], 1)
        z = normalised(F.layer_norm(joined, joined.shape[1:], self.gamma.to(wide), self.beta.to(wide), EPS))
        y = F.linear(z, weight(self.weight.to(wide)), self.bias.to(z.dtype))
        return y, torch.autograd.grad(y, (x, skip), self.grad.to(y.dtype))

    def exact(self):
        return self.reference(torch.float64)

    def eager(self):
        """The released code under autocast: float32 statistics, the normalised value and the weights rounded."""
        return self.reference(FP32, lambda z: z.to(self.dtype), lambda w: w.to(self.dtype))


def forget_launches():
    for kept in (long_skip_forward._PROJECTIONS, long_skip_backward._GRADIENTS):
        kept.clear()


@pytest.fixture(params=[90, 80], ids=["descriptors", "pointers"])
def family(request, monkeypatch):
    forget_launches()
    monkeypatch.setattr(long_skip_tiles, "family", lambda device: request.param)
    yield request.param
    forget_launches()


def check(ours, exact, eager, dtype):
    assert error(ours, exact) < LIMITS[dtype]
    assert error(ours, exact) <= 1.25 * error(eager, exact)


@pytest.mark.parametrize(("dtypes", "limit"), [(DTYPES[0], 2e-3), (DTYPES[2], 2.5e-3)], ids=str)
def test_forward_float32_output(dtypes, limit):
    """With the rounding of the weights alone, and of the normalised rows where these are made."""
    problem = Problem(32, 72, dtypes, "offset")
    problem.bias *= 1000  # which a result in 16 bits, or the bias so, would round by more
    wide = problem.ours(FP32)
    assert wide.dtype == FP32
    shift = problem.folded[2].double()
    assert error(wide.double() - shift, problem.exact()[0] - shift) < limit


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("fp32_weights", [True, False])
def test_fold(dtype, fp32_weights, monkeypatch):
    monkeypatch.setattr(long_skip_forward, "FOLD_BLOCK", 64)  # so that 80 columns take two steps
    problem = Problem(1, 40, (dtype, dtype, dtype), fp32_weights=fp32_weights)
    folded, row_sums, bias = long_skip.fold(problem.gamma, problem.beta, problem.weight, problem.bias, dtype)
    product = problem.gamma.float() * problem.weight.float()
    assert torch.equal(folded, product.to(dtype))
    assert error(row_sums, folded.double().sum(1)) < 1e-6
    assert error(bias, problem.bias.double() + problem.weight.double() @ problem.beta.double()) < 1e-6


def gradients(problem, needs=(True, True)):
    """dx, dskip as an op would get them, and what `prepare_backward` hands out."""
    problem.y = problem.ours()
    prepared = long_skip.prepare_backward(problem.grad, problem.y, *problem.folded[1:], problem.dtype)
    halves = (problem.x, problem.skip, problem.mean, problem.rstd, problem.folded[0])
    return long_skip.backward_input(prepared[3], *halves, *prepared[:2], needs)[:2], prepared[:3]


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_strided_rows_read_nothing_else(dtypes, family):
    problem = Problem(19, 64, dtypes)
    expected = gradients(problem)[0]
    y = problem.y
    for name, width in (("x", 96), ("skip", 128), ("grad", 160)):  # a stride each: none can stand for another
        value = getattr(problem, name)
        base = torch.full((20, width), torch.nan, dtype=value.dtype)
        base[:19, 16:80] = value
        setattr(problem, name, base[:19, 16:80])
    ours = gradients(problem)[0]
    assert torch.equal(problem.y, y)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))


def check_all(problem):
    (grad_x, grad_skip), _ = gradients(problem)
    exact, eager = problem.exact(), problem.eager()
    check(problem.y, exact[0], eager[0], problem.dtype)
    for half, ours, reference, theirs in zip(
        (problem.x, problem.skip), (grad_x, grad_skip), exact[1], eager[1], strict=True
    ):
        assert ours.dtype == half.dtype
        check(ours, reference, theirs.to(half.dtype), BF16 if half.dtype == BF16 else problem.dtype)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 37])
def test_forward_and_gradients(count, dtypes):
    check_all(Problem(count, 72, dtypes))


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_several_tiles_each_way(dtypes, family):
    """More tiles than programs, and a last tile that is not full, in every direction."""
    check_all(Problem(130, 136, dtypes))


@triton.jit
def _places(out, row_tiles, column_tiles, GROUP: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    row, column = long_skip_tiles.tile_place(tile, row_tiles, column_tiles, GROUP)
    tl.store(out + 2 * tile, row)
    tl.store(out + 2 * tile + 1, column)


def test_tiles_go_down_a_group_of_rows_and_then_to_the_next_column():
    rows, columns, height = 5, 3, 2  # groups of two, two and one
    places = torch.zeros(rows * columns, 2, dtype=torch.int64)
    _places[(rows * columns,)](places, rows, columns, GROUP=height, enable_fp_fusion=True)
    groups = (range(rows)[first : first + height] for first in range(0, rows, height))
    assert places.tolist() == [[i, j] for group in groups for j in range(columns) for i in group]


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("kinds", [("offset", "offset"), ("offset", "plain"), ("massive", "massive")], ids=str)
def test_accuracy_of_offsets_and_outliers(kinds, dtypes):
    check_all(Problem(48, 128, dtypes, *kinds))


def test_real_width(monkeypatch):
    """Forward and one gradient at the width of XL/2; its weights are folded in torch, which takes no time."""
    problem = Problem(32, 1152, DTYPES[0], "offset", "massive")
    folded = (problem.gamma * problem.weight).to(BF16)
    parts = (folded, folded.float().sum(1), problem.weight @ problem.beta + problem.bias)
    monkeypatch.setattr(problem, "fold", lambda: parts)
    (ours, nothing), _ = gradients(problem, (True, False))
    exact, eager = problem.exact(), problem.eager()
    assert nothing is None
    check(problem.y, exact[0], eager[0], BF16)
    check(ours, exact[1][0], eager[1][0].to(BF16), BF16)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_half_that_nobody_needs(needs):
    problem = Problem(9, 72, DTYPES[2])
    both, _ = gradients(problem)
    for ours, expected, needed in zip(gradients(problem, needs)[0], both, needs, strict=True):
        assert torch.equal(ours, expected) if needed else ours is None


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("count", [1, 2 * long_skip_backward.CHUNK + 3])
def test_prepare_backward(count, dtypes):
    problem = Problem(count, 72, dtypes, "offset")
    y = problem.ours()
    wide = torch.full((count, 88), torch.nan, dtype=problem.dtype)
    wide[:, :72] = problem.grad
    c1, c2, total, copy = long_skip.prepare_backward(wide[:, :72], y, *problem.folded[1:], problem.dtype)
    assert copy.is_contiguous()
    assert torch.equal(copy, problem.grad)
    grad, (_, u, shift) = problem.grad.double(), (part.double() for part in problem.folded)
    assert error(c1, (grad * (y.double() - shift)).sum(1) / 144) < 2e-6
    assert error(c2, grad @ u / 144) < 2e-6
    assert error(total, grad.sum(0)) < 1e-6


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_prepare_backward_rounds_a_wide_gradient_once(dtypes):
    """As if it had come rounded: the copy that is multiplied is what c1, c2 and the sum are of."""
    problem = Problem(37, 72, dtypes, "offset")
    given = (problem.ours(), *problem.folded[1:], problem.dtype)
    wide = problem.grad.float() * 1.0037
    *sums, copy = long_skip.prepare_backward(wide, *given)
    *expected, same = long_skip.prepare_backward(wide.to(problem.dtype), *given)
    assert torch.equal(copy, same)
    assert all(torch.equal(*pair) for pair in zip(sums, expected, strict=True))


@pytest.mark.parametrize("width", [16, 72, 2 * long_skip_backward.CHUNK + 3])
def test_gradients_of_parameters(width):
    """Strided rows of W, whose neighbours are not read; dW takes the place of P."""
    problem = Problem(1, width, DTYPES[2])
    weight = torch.full((width, 2 * width + 9), torch.nan)[:, 4:-5].copy_(problem.weight)
    product, total = torch.randn(width, 2 * width), torch.randn(width)
    norm, exact = (problem.gamma, problem.beta), product.double()
    of_gamma, of_beta, grad = long_skip.backward_parameters(given := product.clone(), total, *norm, weight)
    assert grad is given
    expected = exact * problem.gamma.double() + total.double()[:, None] * problem.beta.double()
    assert error(grad, expected) < 1e-6
    assert error(of_gamma, (weight.double() * exact).sum(0)) < 1e-6
    assert error(of_beta, weight.double().T @ total.double()) < 1e-6


def normalised(problem):
    joined = torch.cat([problem.x.double(), problem.skip.double()], 1)
    return (joined - problem.mean.double()[:, None]) * problem.rstd.double()[:, None]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_gradient_leaves_the_normalised_rows(dtypes, family):
    """And changes no bit by it; several tiles each way."""
    problem = Problem(130, 136, dtypes, "offset")
    expected, (c1, c2, _) = gradients(problem)
    given = (problem.grad, problem.x, problem.skip, problem.mean, problem.rstd, problem.folded[0], c1, c2)
    *grads, unit = long_skip.backward_input(*given, want_unit=True)
    assert all(torch.equal(*pair) for pair in zip(grads, expected, strict=True))
    assert unit.dtype == problem.dtype
    assert error(unit, normalised(problem)) < LIMITS[problem.dtype]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 72), (37, 72), (5, 136), (3, 1152)], ids=str)
def test_passes_around_library_gemms(sizes, dtypes):
    """Strided rows, whose neighbours are not read; rounding of the product g W' is that of the reference."""
    problem = Problem(*sizes, dtypes, "offset")
    problem.mean, problem.rstd = problem.statistics()
    for name, past in (("x", 2), ("skip", 7)):  # a stride each
        value = getattr(problem, name)
        wide = torch.full((sizes[0], sizes[1] + 3 + past), torch.nan, dtype=value.dtype)
        setattr(problem, name, wide[:, 3:-past].copy_(value))
    rows = (problem.x, problem.skip, problem.mean, problem.rstd)
    exact = normalised(problem)
    unit = long_skip_rows.normalise(*rows, problem.dtype)
    assert unit.dtype == problem.dtype
    assert error(unit, exact) < LIMITS[problem.dtype]
    turned = (problem.grad.double() @ (problem.gamma * problem.weight).double()).to(problem.dtype)
    *grads, again = long_skip_rows.finish(turned, *rows)
    assert torch.equal(again, unit)
    above = turned.double()
    mean, along = above.mean(1, keepdim=True), (above * exact).mean(1, keepdim=True)
    expected = problem.rstd.double()[:, None] * (above - mean - exact * along)
    for ours, half, reference in zip(grads, rows[:2], expected.chunk(2, 1), strict=True):
        assert ours.dtype == half.dtype
        assert error(ours, reference) < {FP32: 2e-6}.get(half.dtype, LIMITS[half.dtype])


def test_no_rows_around_library_gemms():
    none, rows = torch.zeros(0), torch.zeros(0, 64, dtype=BF16)
    assert long_skip_rows.normalise(rows, rows, none, none, BF16).shape == (0, 128)
    assert [x.shape for x in long_skip_rows.finish(torch.zeros(0, 128), rows, rows, none, none)] == [
        (0, 64), (0, 64), (0, 128),
    ]  # fmt: skip


def test_gradient_of_another_dtype_or_alignment():
    problem = Problem(19, 64, DTYPES[0])
    expected, _ = gradients(problem)
    grad = problem.grad
    wide = torch.full((19, 70), torch.nan, dtype=BF16)
    wide[:, 3:67] = grad
    odd = torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:].view(grad.shape).copy_(grad)
    for problem.grad in (grad.float(), wide[:, 3:67], odd):
        assert all(torch.equal(*pair) for pair in zip(gradients(problem)[0], expected, strict=True))


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (FP32, BF16, BF16)])
def test_configurations_agree(dtypes, monkeypatch):
    """All that a launch may be given differ in what cannot change a bit. One with another block_k would."""
    problem = Problem(70, 136, dtypes)
    results, used = [], set()
    for place in range(4):

        def pick(part, kind, *_, place=place):
            allowed = long_skip_tiles.configurations(90, part, kind)
            tiles = allowed[min(place, len(allowed) - 1)]
            used.add((part, tiles))
            return tiles

        forget_launches()
        monkeypatch.setattr(long_skip_tiles, "tiles_for", pick)
        results.append([problem.ours(), *gradients(problem)[0]])
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], result, strict=True))
    kinds = {"backward": "16-bit, float32 out"} if dtypes[0] == FP32 else {"forward": "16-bit", "backward": "16-bit"}
    allowed = {(part, tiles) for part in kinds for tiles in long_skip_tiles.configurations(90, part, kinds[part])}
    assert used == allowed


def test_every_configuration_that_a_table_may_name_is_compiled_and_orders_sums_alike():
    compiled = {
        arch: {
            (case.constants["BLOCK_M"], case.constants["BLOCK_N"], case.constants["BLOCK_K"], *case.options.values())
            for case in long_skip_forward.aot_cases(arch) + long_skip_backward.aot_cases(arch)
            if "BLOCK_M" in case.constants
        }
        for arch in (80, 90)
    }
    for arch, kind, _ in long_skip_tiles.CONFIGS:
        for part in ("forward", "backward"):
            allowed = long_skip_tiles.configurations(arch, part, kind)
            assert set(allowed) <= compiled[arch]
            assert len({tiles.block_k for tiles in allowed}) == 1


def test_empty_batch():
    problem = Problem(0, 64, DTYPES[0])
    ours, prepared = gradients(problem)
    assert problem.ours().shape == ours[0].shape == ours[1].shape == (0, 64)
    assert not prepared[2].any()


def test_supports_names_what_it_refuses():
    x = torch.zeros(4, 64, dtype=BF16)
    assert long_skip.supports(x, x.float(), BF16) == []
    assert "float32" in long_skip.supports(x, x, FP32)[0]
    assert "float64" in long_skip.supports(x.double(), x, BF16)[0]
    assert "multiple of 16" in long_skip.supports(x[:, :56], x[:, :56], BF16)[0]


@pytest.mark.parametrize("skip_dtype", [FP32, BF16], ids=str)
def test_one_node_as_trained_has_the_bits_of_the_op(skip_dtype):
    problem = Problem(12, 32, (FP32, skip_dtype, BF16))
    halves = [each.view(2, 6, 32).requires_grad_() for each in (problem.x, problem.skip)]
    parameters = tuple(map(torch.nn.Parameter, (problem.gamma, problem.beta, problem.weight, problem.bias)))
    stats = [ops.row_statistics(half) for half in halves]
    parameters[2].folded = Folded(*parameters)
    above = torch.randn(2, 6, 32)
    with force("triton"), torch.autocast("cpu", BF16):
        op = ops.long_skip(*halves, *parameters, EPS, x_stats=stats[0], skip_stats=stats[1], out_dtype=FP32)
        expected = torch.autograd.grad(op, [*halves, *parameters], above)
        for _ in range(3):  # the last one from a trace
            one = fuses(*halves, parameters, EPS, *stats, FP32)
            assert type(one.grad_fn).__name__ == "_FusesBackward"
            assert torch.equal(one, op)
            assert all(map(torch.equal, torch.autograd.grad(one, [*halves, *parameters], above), expected))
    programs = [program for kind, program in traced._PROGRAMS.items() if kind[0].__module__ == fuses.__module__]
    assert programs
    assert all(map(callable, programs))


def test_no_node_as_trained_where_the_op_must_run():
    """Of what the op would not run by "triton", of rows that it would copy, and where someone looks on."""
    problem = Problem(12, 32, DTYPES[2])
    x, skip = (each.view(2, 6, 32).requires_grad_() for each in (problem.x, problem.skip))
    parameters = tuple(map(torch.nn.Parameter, (problem.gamma, problem.beta, problem.weight, problem.bias)))
    stats = [ops.row_statistics(half) for half in (x, skip)]
    run = lambda x, *options: fuses(x, skip, parameters, EPS, *stats, FP32)  # noqa: E731
    with force("triton"), torch.autocast("cpu", BF16):
        assert run(x) is None, "nothing is kept folded"
        parameters[2].folded = Folded(*parameters)
        assert run(x) is not None
        assert run(torch.zeros(2, 6, 40)[..., :32].requires_grad_()) is None
        assert run(x.detach()) is None
        with FlopCounterMode(display=False):
            assert run(x) is None
    with force("torch"), torch.autocast("cpu", BF16):
        assert run(x) is None
    with force("triton"):
        assert run(x) is None
