"""The C++ adaLN kernels against fp64, for every instruction set of this machine: values, gradients, bits, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dit_fast import _C
from dit_fast.ops import adaln, adaln_cpp
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

pytestmark = pytest.mark.skipif(_C.unavailable() is not None, reason=str(_C.unavailable()))
LEVELS = range(torch.ops.dit_fast_native.isa_level() + 1) if _C.unavailable() is None else ()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
SHAPES = [(1, 1, 2), (2, 5, 7), (3, 66, 16), (2, 131, 33), (1, 3, 1151), (2, 70, 768)]
PARTS = ["norm", "norm passes", "residual", "both", "norm rms", "norm rms scale", "both scale"]
EPS = 1e-6


@pytest.fixture(params=LEVELS, ids=[_C.LEVELS[level] for level in LEVELS])
def level(request, monkeypatch):
    """Chooses the instruction set, and fills outputs with NaN beforehand so that one left unwritten is seen."""
    monkeypatch.setattr(adaln_cpp, "_BEST_LEVEL", request.param)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    return request.param


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(shape, part, stream=torch.float32, branch=None, vectors=None, out=None):
    """(x, y, gate, shift, scale) and the gradients of (x_new, out); None for what the part lacks."""
    branch, vectors, out = branch or stream, vectors or stream, out or stream
    row = (shape[0], shape[2])
    x, gate, shift, scale = random(shape, stream, 0), *(random(row, vectors, seed) for seed in (1, 2, 3))
    shift = None if "scale" in part else shift
    y, above, grad_out = random(shape, branch, 4), random(shape, stream, 5), random(shape, out, 6)
    if "norm" in part:
        return (x, None, None, shift, scale), (above if "passes" in part else None, grad_out)
    return (
        ((x, y, gate, None, None), (above, None))
        if part == "residual"
        else ((x, y, gate, shift, scale), (above, grad_out))
    )


def run(tensors, grads, out_dtype=None, vector_dtype=None, rms=False):
    """(x_new, out, mean, variance) and the five gradients of the kernels."""
    x, y, gate, shift, scale = tensors
    vectors = vector_dtype or next(v.dtype for v in (gate, scale) if v is not None)
    results = adaln_cpp.forward(*tensors, EPS, rms, None, out_dtype or x.dtype, True)
    x_new = x if y is None else results[0]
    saved = (
        x_new,
        y,
        gate,
        scale,
        *results[2:],
        EPS,
        rms,
        shift is not None,
        x.dtype,
        None if y is None else y.dtype,
        (vectors,) * 3,
    )
    of_x, *rest = adaln_cpp.backward(*grads, *saved)
    assert (of_x is None) == (grads[1] is None)  # then it is the gradient of x_new
    return results, (grads[0] if of_x is None else of_x, *rest)


def reference(tensors, grads, dtype=torch.float64, rms=False):
    """The same by autograd through the definition, every operation in `dtype`."""
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    x, y, gate, shift, scale = leaves
    x_new = x if y is None else x + gate[:, None] * y
    norm = F.rms_norm if rms else F.layer_norm
    out = None if scale is None else norm(x_new, x.shape[2:], eps=EPS) * (1 + scale[:, None])
    out = out if shift is None else out + shift[:, None]
    pairs = [(v, g.to(dtype)) for v, g in zip((x_new, out), grads, strict=True) if v is not None and g is not None]
    present = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad([v for v, _ in pairs], present, [g for _, g in pairs]))
    values = (None if y is None else x_new, out)
    return values, [None if leaf is None else next(found) for leaf in leaves]


def matches(ours, expected, tolerance, extra=0.0):
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_close(mine, theirs.detach(), tolerance, extra)


@loop_over("dtype", DTYPES)
@loop_over("part", PARTS)
@loop_over("shape", SHAPES)
def test_values_statistics_and_gradients(level, shape, part, dtype):
    """fp32 to 1e-6, bf16 to 6e-3, fp16 to 1e-3; statistics, of x_new as stored, to 1e-6."""
    tensors, grads = inputs(shape, part, dtype)
    rms = "rms" in part
    (x_new, out, mean, variance), gradients = run(tensors, grads, rms=rms)
    values, expected = reference(tensors, grads, rms=rms)
    rounding = ROUNDING[dtype]
    # Two channels: their normalised values are +-1 whatever they are, and gradients through them nearly cancel.
    cancelled = 3e-6 if shape[2] == 2 else 0.0
    matches((x_new, out), values, rounding, cancelled)
    matches(gradients, expected, rounding, cancelled)
    stored = (tensors[0] if x_new is None else x_new).double()
    assert_close(mean, stored.mean(2), 1e-6, 1e-6)
    assert_close(variance, stored.var(2, correction=0), 1e-6)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert gradient is None or (gradient.dtype, gradient.shape) == (dtype, tensor.shape)


@loop_over("part", PARTS)
def test_bfloat16_error_is_at_most_that_of_eager(level, part):
    """Against fp64 on the same rounded inputs: within 1.25 times the error of eager bf16 (kernels.md §7)."""
    tensors, grads = inputs((3, 150, 384), part, torch.bfloat16)
    rms = "rms" in part
    results, gradients = run(tensors, grads, rms=rms)
    exact, ours = reference(tensors, grads, rms=rms), (results[:2], gradients)
    eager = reference(tensors, grads, torch.bfloat16, rms)
    for mine, bound, true in zip(*(itertools.chain(*side) for side in (ours, eager, exact)), strict=True):
        if true is not None:
            error, allowed = ((side.double() - true).norm() for side in (mine, bound))
            assert error <= 1.25 * allowed


@loop_over("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_is_rounded_once_to_nearest_even(level, dtype):
    """gate * y of two 16-bit numbers is exact in fp32, so x_new has one right value; ties are among the inputs."""
    x, y, gate, _, _ = inputs((4, 40, 37), "residual", dtype)[0]
    step = torch.finfo(dtype).eps
    x[0], y[0], gate[0] = torch.tensor([1.0, 1 + step]).repeat(19)[:37], step, 0.5
    x_new = adaln_cpp.forward(x, y, gate, None, None, EPS, False, None, dtype, False)[0]
    assert torch.equal(x_new, (x.float() + gate.float()[:, None] * y.float()).to(dtype))
    assert set(x_new[0].unique().tolist()) == {1.0, 1 + 2 * step}


@loop_over(
    ("stream", "branch", "vectors", "out"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_mixed_types(level, stream, branch, vectors, out):
    """Each result in its own type: error within the rounding of that type and, behind x_new, of the stream's."""
    tensors, grads = inputs((2, 67, 45), "both", stream, branch, vectors, out)
    results, gradients = run(tensors, grads, out, vectors)
    assert [t.dtype for t in results] == [stream, out, torch.float32, torch.float32]
    assert [t.dtype for t in gradients] == [stream, branch, vectors, vectors, vectors]
    values, expected = reference(tensors, grads)
    for mine, theirs in zip((*results[:2], *gradients), (*values, *expected), strict=True):
        assert_close(mine, theirs.detach(), max(ROUNDING[mine.dtype], ROUNDING[stream]))


@loop_over("width", [48, 45])
def test_strides_are_followed(level, width):
    """Chunks of one [N, 6D] tensor, sliced, transposed and expanded streams and gradients: the bits of plain copies."""
    wide = random((5, 2, 70, 3 * width), torch.float32, 0)
    gate, shift, scale = random((2, 6 * width), torch.float32, 1).chunk(6, 1)[1:4]
    x, y = wide[0, ..., width : 2 * width], wide[1:3, 0, :, ::3].transpose(1, 2).contiguous().transpose(1, 2)
    above, grad_out = wide[:1, 0, :1, :width].expand(2, 70, width), torch.ones(()).expand(2, 70, width)
    plain = [t.clone(memory_format=torch.contiguous_format) for t in (x, y, gate, shift, scale)]
    strided = run((x, y, gate, shift, scale), (above, grad_out))
    again = run(plain, (above.contiguous(), grad_out.contiguous()))
    for ours, theirs in zip(itertools.chain(*strided), itertools.chain(*again), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
    matches(strided[1], reference(plain, (above, grad_out))[1], 1e-6)
    # One sample and one token's vectors for all: stride 0.
    same = [t[:1].expand_as(t) for t in (x, y, gate, shift, scale)]
    copies = [t.contiguous() for t in same]
    for ours, theirs in zip(*(itertools.chain(*run(t, (above, grad_out))) for t in (same, copies)), strict=True):
        assert torch.equal(ours, theirs)


def test_known_statistics_replace_measured_ones(level):
    (x, _, _, shift, scale), _ = inputs((2, 9, 21), "norm", torch.bfloat16)
    _, out, mean, variance = adaln_cpp.forward(x, None, None, shift, scale, EPS, False, None, x.dtype, True)
    again = adaln_cpp.forward(x, None, None, shift, scale, EPS, False, (mean, variance), x.dtype, True)
    assert torch.equal(again[1], out)
    assert again[2] is mean
    assert again[3] is variance
    shifted = adaln_cpp.forward(x, None, None, shift, scale, EPS, False, (mean + 1, variance), x.dtype, False)
    inverse = (variance + EPS).rsqrt()[..., None]
    assert_close(shifted[1], out.double() - inverse * (1 + scale.float()[:, None]), 6e-3)
    assert shifted[2:] == (None, None)


def test_parts_that_are_not_asked_for_are_absent(level):
    (x, y, gate, shift, scale), (above, grad_out) = inputs((2, 5, 19), "both")
    x_new, _, mean, variance = adaln_cpp.forward(x, y, gate, shift, scale, EPS, False, None, x.dtype, True)
    assert adaln_cpp.forward(x, y, gate, None, None, EPS, False, None, x.dtype, False)[1:] == (None, None, None)
    statistics = adaln_cpp.forward(x_new, None, None, None, None, EPS, False, None, x.dtype, True)
    assert statistics[:2] == (None, None)
    assert torch.equal(torch.stack(statistics[2:]), torch.stack((mean, variance)))
    # Only out has a gradient, or only x_new: their sum is that of both.
    saved = (gate, scale, mean, variance, EPS, False, True, x.dtype, y.dtype, (x.dtype,) * 3)
    both = adaln_cpp.backward(above, grad_out, x_new, y, *saved)
    through_out = adaln_cpp.backward(None, grad_out, x_new, y, *saved)
    through_x_new = [above, *adaln_cpp.backward(above, None, None, y, gate, None, None, None, *saved[4:])[1:]]
    assert through_x_new[3:] == [None, None]
    for k in range(3):
        assert_close(through_out[k] + through_x_new[k], both[k], 1e-6)
    assert torch.equal(torch.stack(through_out[3:]), torch.stack(both[3:]))


def test_rows_far_from_zero_keep_their_variance(level):
    """A mean of 100 standard deviations costs the two-pass variance nothing; the mean's own rounding stays, 1e-5."""
    (x, _, _, shift, scale), _ = inputs((2, 8, 768), "norm")
    x += 100
    _, out, mean, variance = adaln_cpp.forward(x, None, None, shift, scale, EPS, False, None, x.dtype, True)
    assert_close(variance, x.double().var(2, correction=0), 1e-6)
    assert_close(mean, x.double().mean(2), 3e-7)
    expected = F.layer_norm(x.double(), (768,), eps=EPS) * (1 + scale[:, None].double()) + shift[:, None].double()
    assert_close(out, expected, 3e-5)
    _, out, *_ = adaln_cpp.forward(x, None, None, None, scale, EPS, True, (mean, variance), x.dtype, True)
    assert_close(out, F.rms_norm(x.double(), (768,), eps=EPS) * (1 + scale[:, None].double()), 1e-6)


@loop_over("dtype", DTYPES)
@loop_over("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_spreads_where_it_must_and_no_further(level, bad, dtype):
    tensors, grads = inputs((3, 70, 35), "both", dtype)
    tensors[0][1, 66, 34] = bad
    results, gradients = run(tensors, grads)
    expected_values, expected = reference(tensors, grads, torch.float32)
    for ours, theirs in zip((*results[:2], *gradients), (*expected_values, *expected), strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.isfinite(results[1]).sum() == results[1].numel() - 35
    assert gradients[4].isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_bits_do_not_depend_on_threads_or_on_the_instruction_set(monkeypatch, part, dtype):
    """AVX2 and AVX-512 agree bit for bit; the portable version, without fused multiply-add, to 1e-6 (bf16: 4e-3)."""
    tensors, grads = inputs((3, 417, 75), part, dtype)
    threads, results = torch.get_num_threads(), {}
    try:
        for count, level in itertools.product((1, 2, 3), LEVELS):
            monkeypatch.setattr(adaln_cpp, "_BEST_LEVEL", level)
            torch.set_num_threads(count)
            results[count, level] = [t for t in itertools.chain(*run(tensors, grads)) if t is not None]
    finally:
        torch.set_num_threads(threads)
    for (_, level), outputs in results.items():
        for ours, same_level, best in zip(outputs, results[1, level], results[1, LEVELS[-1]], strict=True):
            assert torch.equal(ours, same_level)
            if level:
                assert torch.equal(ours, best)
            else:
                assert_close(ours, best, 4e-3 if ours.dtype == torch.bfloat16 else 1e-6)


def test_a_row_does_not_depend_on_its_neighbours(level):
    """Rows are taken several at a time; the last ones of a sample one by one, to the same bits."""
    tensors, grads = inputs((1, 71, 40), "both")
    x, y, gate, shift, scale = tensors
    results, gradients = run(tensors, grads)
    for token in (0, 64, 67, 70):
        part = slice(token, token + 1)
        alone = run((x[:, part], y[:, part], gate, shift, scale), [g[:, part] for g in grads])
        for whole, one in zip((*results, *gradients[:2]), (*alone[0], *alone[1][:2]), strict=True):
            assert torch.equal(whole[:, part], one)


@loop_over("shape", [(0, 4, 8), (2, 0, 8)])
def test_an_empty_batch_and_samples_without_tokens(level, shape):
    results, gradients = run(*inputs(shape, "both"))
    assert results[0].shape == results[1].shape == gradients[0].shape == shape
    for vector in gradients[2:]:
        assert torch.equal(vector, torch.zeros(shape[0], shape[2]))


def test_the_public_definition_is_the_one_computed():
    tensors, _ = inputs((2, 6, 24), "both")
    ours = adaln_cpp.forward(*tensors, EPS, False, None, torch.float32, False)
    matches(ours[:2], adaln.gate_residual_modulate(*tensors, backend="torch"), 1e-6)


def test_operators_name_what_they_cannot_take():
    (x, y, gate, shift, scale), (above, grad_out) = inputs((2, 5, 6), "both")
    good = (x, y, gate, shift, scale)
    mean = torch.zeros(2, 5)
    for place, change, message in (
        (0, x[0], r"x must be \[N, T, D\]"),
        (0, x[..., :0], "x has no channels"),
        (0, x.double(), "x must be float32, bfloat16 or float16"),
        (1, y[:, :4], r"y must be \[2, 5, 6\]"),
        (1, y.long(), "y must be float32, bfloat16 or float16"),
        (1, None, "y, gate and x_new go together"),
        (2, gate[:1], r"gate must be \[2, 6\]"),
        (3, shift[:, None], r"shift must be \[2, 6\]"),
        (4, None, "scale with out"),
    ):
        tensors = [change if i == place else tensor for i, tensor in enumerate(good)]
        outputs = (torch.empty_like(x), torch.empty_like(x), None, None)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.dit_fast_native.adaln_forward(*tensors, None, None, EPS, False, *outputs, -1)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="x must have a contiguous last dimension"):
        torch.ops.dit_fast_native.adaln_forward(transposed, *[None] * 6, EPS, False, None, None, mean, mean.clone(), -1)
    with pytest.raises(RuntimeError, match="mean has 4 elements, expected 10"):
        torch.ops.dit_fast_native.adaln_forward(x, *[None] * 6, EPS, False, None, None, mean[:, :2].clone(), mean, -1)
    with pytest.raises(RuntimeError, match="known statistics are those of x itself"):
        adaln_cpp.forward(*good, EPS, False, (mean, mean), x.dtype, False)
    with pytest.raises(RuntimeError, match="level 9 is above"):
        torch.ops.dit_fast_native.adaln_forward(x, *[None] * 6, EPS, False, None, None, mean, mean.clone(), 9)
    rest = (EPS, False, True, x.dtype, y.dtype, (x.dtype,) * 3)
    with pytest.raises(RuntimeError, match="grad_out needs x_new, scale, mean and variance"):
        adaln_cpp.backward(above, grad_out, None, y, gate, scale, mean, mean, *rest)
    outputs = (torch.empty_like(x), None, None, torch.empty_like(shift), torch.empty_like(scale))
    short = (None, grad_out[:, :3], x, None, None, scale, mean, mean, EPS, False)
    with pytest.raises(RuntimeError, match=r"grad_out must be \[2, 5, 6\]"):
        torch.ops.dit_fast_native.adaln_backward(*short, *outputs, -1)
    with pytest.raises(ValueError, match="both None"):
        adaln_cpp.backward(None, None, x, y, gate, scale, mean, mean, *rest)
