"""adaLN kernels against float64 on equally rounded inputs: parts, type mixes, widths, chunks, strides, masks."""

import pytest
import torch

from dit_fast.backend import force
from dit_fast.errors import UserError
from dit_fast.kernels import adaln as kernel
from dit_fast.kernels import adaln_gradients, tuning
from dit_fast.kernels.launch import Kept, launcher
from dit_fast.nn.block import Block
from dit_fast.nn.linear import make_shadows
from dit_fast.ops import (
    adaln,
    branches,
    gate_residual,
    gate_residual_modulate,
    layer_norm_modulate,
    linear,
    traced,
)
from dit_fast.ops.diversity_taps import DiversityTaps

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-6, FP16: 1e-3, BF16: 6e-3}  # relative RMS error
PARTS = {  # residual, norm, RMSNorm, shift
    "norm": (False, True, False, True),
    "residual": (True, False, False, False),
    "both": (True, True, False, True),
    "rms": (False, True, True, True),
    "both, rms without shift": (True, True, True, False),
    "norm without shift": (False, True, False, False),
    "norm, x passes": (False, True, False, True),
}
MIXES = {  # stream, branch, vectors, out
    "fp32": (FP32, FP32, FP32, FP32),
    "bf16": (BF16, BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16, FP16),
    "fp32 stream under bf16 autocast": (FP32, BF16, BF16, BF16),
    "bf16 stream, fp32 branch": (BF16, FP32, FP32, FP16),
}
EPS = 1e-6


def error(ours, exact):
    exact = exact.double()
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def make(sizes, part, mix="fp32", seed=0):
    """(x, y, gate, shift, scale), (grad of x_new, grad of out); None where the part has none."""
    (batch, tokens, width), (stream, branch, vectors, out) = sizes, MIXES[mix]
    residual, norm, _, shifted = PARTS[part]
    generator = torch.Generator().manual_seed(seed)

    def draw(here, dtype, *shape):
        values = torch.randn(*shape, generator=generator).to(dtype)
        return values if here else None

    x = draw(True, stream, batch, tokens, width) + 0.5
    y = draw(residual, branch, batch, tokens, width)
    modulation = torch.randn(batch, 6 * width, generator=generator).to(vectors)  # rows are strided, as in a block
    gate, shift, scale = modulation.chunk(6, dim=1)[1:4]
    gate, shift, scale = gate if residual else None, shift if shifted else None, scale if norm else None
    above = residual or "passes" in part
    grads = draw(above, stream, batch, tokens, width), draw(norm, out, batch, tokens, width)
    return (x, y, gate, shift, scale), grads


def wide(tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def run(inputs, grads, mix="fp32", stats=None, side=kernel, rms=False):
    """x_new, out, mean, variance, and the five gradients, of the kernels or of the op's own torch implementation."""
    x, y, gate, shift, scale = inputs
    stream, branch, vectors, out = MIXES[mix]
    if side is kernel:
        results = kernel.forward(*inputs, EPS, rms, stats, out, True)
    else:
        results = adaln._torch_forward(*inputs, stats, EPS, rms, out, True)
    x_new = x if y is None else results[0]
    saved = (x_new, y, gate, scale, *results[2:], EPS, rms, shift is not None)
    if side is kernel:
        found = kernel.backward(*grads, *saved, stream, branch, [vectors] * 3)
    else:
        found = adaln._torch_backward(*grads, *saved)
        dtypes = (stream, branch, vectors, vectors, vectors)
        found = [g if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]
    assert (found[0] is None) == (grads[1] is None)  # then it is the gradient of x_new
    return [*results, grads[0] if found[0] is None else found[0], *found[1:]]


def exact(inputs, grads, x_new=None, rms=False):
    """The same in float64 by autograd; out and all gradients at x_new as it was stored."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in wide(inputs)]
    x, y, gate, shift, scale = leaves
    stream = x if y is None else x + gate[:, None] * y
    # The value that was rounded, with the gradient of the sum.
    rounded = stream if x_new is None else stream + (x_new.double() - stream).detach()
    mean = rounded.mean(-1, keepdim=True)
    variance = (rounded - mean).square().mean(-1, keepdim=True)
    outputs, above = ([] if grads[0] is None else [rounded]), [g for g in wide(grads) if g is not None]
    out = None
    if scale is not None:
        norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
        out = norm(rounded, x.shape[2:], eps=EPS) * (1 + scale[:, None])
        out = out if shift is None else out + shift[:, None]
        outputs.append(out)
    found = iter(torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf is not None], above))
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    values = [None if y is None else stream, out, mean.squeeze(-1), variance.squeeze(-1)]
    return [None if v is None else v.detach() for v in values] + gradients


def compare(inputs, grads, mix="fp32", stats=None, rms=False):
    ours = run(inputs, grads, mix, stats, rms=rms)
    expected = exact(inputs, grads, ours[0], rms)
    stream, branch, vectors, out = MIXES[mix]
    types = [stream, out, FP32, FP32, stream, branch, vectors, vectors, vectors]
    for place, (each, reference, dtype) in enumerate(zip(ours, expected, types, strict=True)):
        assert (each is None) == (reference is None)
        if each is None:
            continue
        assert each.dtype == dtype
        assert each.shape == reference.shape
        assert each.is_contiguous()
        assert error(each, reference) < LIMITS[dtype], place
        if dtype != FP32:  # rounded once
            assert error(each, reference) <= 1.02 * error(reference.to(dtype), reference) + 1e-7, place
    return ours


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("part", PARTS)
def test_parts_in_every_mix_of_types(part, mix):
    """One token more than a chunk, a width that no power of two divides."""
    compare(*make((2, kernel.CHUNK + 1, 40), part, mix), mix, rms=PARTS[part][2])


@pytest.mark.parametrize(
    ("sizes", "mix"),
    [
        ((1, 1, 1), "fp32"),
        ((3, 1, 7), "bf16"),
        ((2, 3, 33), "fp32"),
        ((1, 2 * kernel.CHUNK, 16), "fp32"),
        ((1, 9, 768), "bf16"),
        ((1, 3, 1024), "fp16"),
        ((2, 5, 1152), "fp32 stream under bf16 autocast"),
        ((1, 2, 1151), "fp32"),
        ((1, 2, 2048), "fp32"),
    ],
)
def test_sizes(sizes, mix):
    inputs, grads = make(sizes, "both", mix)
    if sizes[-1] > 1:
        compare(inputs, grads, mix)
    else:  # a row of one has no variance: out is the shift
        ours = run(inputs, grads)
        assert torch.equal(ours[1], inputs[3][:, None])
        assert torch.equal(ours[4], grads[0])


def test_known_statistics_are_read_and_handed_back():
    inputs, grads = make((2, 11, 40), "norm")
    x = inputs[0].double()
    known = x.mean(-1).float(), x.var(-1, correction=0).float()
    compare(inputs, grads, stats=known, rms=True)
    ours = compare(inputs, grads, stats=known)
    assert torch.equal(ours[2], known[0])
    assert torch.equal(ours[3], known[1])
    moved = kernel.forward(*inputs, EPS, False, (known[0] + 1, known[1]), FP32, True)[1]
    assert error(moved, ours[1]) > 0.1


def test_statistics_are_those_of_the_stored_row():
    inputs, _ = make((1, 5, 48), "residual", "bf16")
    x_new, out, mean, variance = kernel.forward(*inputs, EPS, False, None, BF16, True)
    assert out is None
    assert error(mean, x_new.double().mean(-1)) < 1e-6
    assert error(variance, x_new.double().var(-1, correction=0)) < 1e-6
    assert kernel.forward(*inputs, EPS, False, None, BF16, False)[2:] == (None, None)


def test_a_mean_of_a_hundred_deviations_and_constant_rows():
    inputs, grads = make((2, 6, 40), "norm")
    x = (0.01 * inputs[0] + 1).bfloat16().float()
    x[0, 3] = 2.5
    inputs = (x, *inputs[1:])
    for ours, reference in zip(run(inputs, grads), exact(inputs, grads), strict=True):
        if ours is not None:
            assert ours.isfinite().all()
            # A mean of 1 in fp32 has an error of 6e-8, a hundred times that relative to the deviation.
            assert error(ours, reference) < 2e-5


def test_rms_of_a_mean_of_a_hundred_deviations_loses_nothing():
    inputs, grads = make((2, 6, 40), "rms")
    inputs = (0.01 * inputs[0] + 1, *inputs[1:])
    found, expected = run(inputs, grads, rms=True), exact(inputs, grads, rms=True)
    for place in (1, 4, 7, 8):  # out, and the gradients
        assert error(found[place], expected[place]) < 1e-6


@pytest.mark.parametrize("width", [32, 21])
def test_any_strides_and_addresses(width):
    """Streams inside wider rows, at odd addresses, transposed, expanded; gradients too."""
    sizes = (3, 10, width)
    inputs, grads = make(sizes, "both")
    expected = exact(inputs, grads)

    def padded(tensor, offset):
        return torch.full((3, 12, width + 7), torch.nan)[:, 1:11, offset : offset + width].copy_(tensor)

    def turned(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    x, y, *vectors = inputs
    vectors = [torch.full((3, width + 3), torch.nan)[:, 2:-1].copy_(vector) for vector in vectors]
    for (a, b), (c, d) in (((padded(x, 4), turned(y)), (padded(grads[0], 0), turned(grads[1]))),
                           ((turned(x), padded(y, 3)), (turned(grads[0]), padded(grads[1], 5)))):  # fmt: skip
        for ours, reference in zip(run((a, b, *vectors), (c, d)), expected, strict=True):
            assert error(ours, reference) < 1e-6
    row, one = x[:1, :1].expand(sizes), grads[0][:, :1].expand(sizes)
    expanded = (row, y, *(vector[:1].expand(3, width) for vector in vectors)), (one, grads[1][..., :1].expand(sizes))
    for ours, reference in zip(run(*expanded), exact(*expanded), strict=True):
        assert error(ours, reference) < 1e-6


def launched(monkeypatch):
    """What the launches to come are given, each the addresses of its tensors."""
    found = []

    def watched(*arguments):
        launch = launcher(*arguments)
        return lambda *tensors: (found.append([each.data_ptr() for each in tensors]), launch(*tensors))[1]

    for module, kept in ((kernel, "_FORWARD"), (adaln_gradients, "_BACKWARD")):
        monkeypatch.setattr(module, "launcher", watched)
        monkeypatch.setattr(module, kept, Kept())
    return found


def places(tensors):
    return [each.data_ptr() for each in tensors]


def test_rows_are_read_where_they_lie(monkeypatch):
    """Chunks of a modulation, tokens of a longer sequence, channels of wider rows, one row or one sample for all."""
    found = launched(monkeypatch)
    wide = torch.randn(3, 9, 48)
    x, y = wide[:, 1:, :16], torch.randn(3, 1, 16).expand(3, 8, 16)
    gate, shift, scale = torch.randn(1, 6 * 16).expand(3, 96).chunk(6, 1)[:3]
    inputs = [each.detach().requires_grad_() for each in (x, y, gate, shift, scale)]
    above, grad_out = torch.randn(8, 3, 16).transpose(0, 1), torch.randn(1, 1, 16).expand(3, 8, 16)
    x_new, out = gate_residual_modulate(*inputs, backend="triton")
    torch.autograd.grad((x_new, out), inputs, (above, grad_out))
    assert found[0][:5] == places(inputs)
    assert found[1][:6] == places((above, grad_out, x_new, inputs[1], inputs[2], inputs[4]))
    found.clear()
    same, out = layer_norm_modulate(inputs[0], *inputs[3:], backend="triton", return_x=True)
    torch.autograd.grad((same, out), inputs[:1], (above, grad_out))
    assert found[0][0] == inputs[0].data_ptr()
    assert found[1][:3] == places((above, grad_out, inputs[0]))


def test_rows_that_do_not_lie_together_are_copied_and_nothing_else_is(monkeypatch):
    """Every other channel, a transposed stream, one number for all: as `by_rows` says."""
    found = launched(monkeypatch)
    x, y = torch.randn(2, 16, 5).transpose(1, 2).requires_grad_(), torch.randn(2, 5, 16, requires_grad=True)
    gate, shift, scale = torch.randn(2, 32)[:, ::2], *torch.randn(2, 2, 16).unbind(0)
    x_new, out = gate_residual_modulate(x, y, gate, shift, scale, backend="triton")
    grads = torch.ones(()).expand(2, 5, 16), torch.randn(2, 5, 16)
    torch.autograd.grad((x_new, out), (x, y), grads)
    forward, backward = (x, y, gate, shift, scale), (*grads, x_new, y, gate, scale)
    taken = [own == place for own, place in zip(places(forward), found[0], strict=False)]
    assert taken == [False, True, False, True, True]
    taken = [own == place for own, place in zip(places(backward), found[1], strict=False)]
    assert taken == [False, True, True, True, False, True]


@pytest.mark.parametrize("part", ["norm", "both"])
def test_one_gradient_alone(part):
    inputs, (_, above) = make((2, 7, 24), part)
    x, y, gate, _, scale = inputs
    leaves = [t.double().requires_grad_() for t in inputs if t is not None]
    results = kernel.forward(*inputs, EPS, False, None, FP32, True)
    saved = (x if y is None else results[0], y, gate, scale, *results[2:])
    ours = kernel.backward(None, above, *saved, EPS, False, True, FP32, FP32, [FP32] * 3)
    wide_x = leaves[0] if y is None else leaves[0] + leaves[2][:, None] * leaves[1]
    out = torch.nn.functional.layer_norm(wide_x, (24,), eps=EPS) * (1 + leaves[-1][:, None]) + leaves[-2][:, None]
    expected = torch.autograd.grad(out, leaves, above.double())
    for each, reference in zip([g for g in ours if g is not None], expected, strict=True):
        assert error(each, reference) < 1e-6


def test_tokens_of_a_program_change_no_bit_and_neither_does_the_batch(monkeypatch):
    inputs, grads = make((3, 37, 24), "both", "bf16")
    first = run(inputs, grads, "bf16")
    entry = {"width": 24, "stream": "bf16", "compute": "bf16", "rows": 3 * 37}
    for program in kernel.PROGRAMS:
        table = {"cpu": {"adaln": [entry | {"configuration": program}]}}
        monkeypatch.setattr(tuning, "TABLES", table)
        kernel._FORWARD.clear()  # an earlier table decided those
        assert all(torch.equal(*pair) for pair in zip(run(inputs, grads, "bf16"), first, strict=True))
    single = run([t[1:2] for t in inputs], [t[1:2] for t in grads], "bf16")
    for ours, same in zip(single, first, strict=True):
        assert torch.equal(ours, same[1:2])


def test_a_bad_token_stays_alone():
    inputs, _ = make((2, 5, 24), "both")
    inputs[0][1, 2, 3] = torch.inf
    x_new, out, *_ = kernel.forward(*inputs, EPS, False, None, FP32, True)
    assert not out[1, 2].isfinite().any()
    assert x_new.isfinite().sum() == x_new.numel() - 1
    assert out.isfinite().sum() == out.numel() - 24


def test_empty_batches_and_no_tokens():
    for sizes in ((0, 3, 8), (2, 0, 8)):
        inputs, grads = make(sizes, "both")
        ours = run(inputs, grads)
        assert [tuple(t.shape) for t in ours[:2]] == [sizes] * 2
        assert all(t.shape == (sizes[0], 8) and (t == 0).all() for t in ours[6:])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("mix", ["fp32", "fp32 stream under bf16 autocast"])
def test_the_public_ops_through_the_kernels(mix, norm):
    """A block's use of all three ops, statistics passed on, against the reference."""
    (x, y, gate, shift, scale), _ = make((2, 9, 24), "both", mix)
    out_dtype, sides = MIXES[mix][3], []
    for backend in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (x, y, gate, shift, scale)]
        a, b, g, h, s = leaves
        first, modulated, stats = gate_residual_modulate(
            a, b, g, h, s, backend=backend, return_stats=True, out_dtype=out_dtype, norm=norm
        )
        second, again = gate_residual(first, modulated, g, backend=backend, return_stats=True)
        out = layer_norm_modulate(second, h, s, backend=backend, stats=again, out_dtype=out_dtype, norm=norm)
        total = (out.float().sin() + second.float().square()).sum()
        sides.append([first, *stats, second, *again, out, *torch.autograd.grad(total, leaves)])
    for ours, reference in zip(*sides, strict=True):
        assert ours.dtype == reference.dtype
        assert error(ours, reference) < (2e-6 if mix == "fp32" else 8e-3)


def test_supports_names_what_it_refuses():
    assert kernel.supports(torch.zeros(1, 2, 2048, dtype=BF16)) == []
    long = torch.zeros(1, 1, 1, dtype=torch.float64).expand(1, kernel.TOKENS * kernel.MAX_CHUNKS + 1, 2049)
    assert [reason.split()[0] for reason in kernel.supports(long)] == [
        "width",
        "torch.float64",
        str(kernel.TOKENS * kernel.MAX_CHUNKS + 1),
    ]


@pytest.mark.parametrize("shift", [True, False])
def test_partial_sums_of_many_are_added_as_those_of_one(shift):
    (x, y, gate, _, scale), above = make((2, 2 * kernel.CHUNK + 5, 300), "both", "fp32 stream under bf16 autocast")
    statistics = torch.var_mean(x, -1, correction=0)[::-1]
    nodes = [
        (above[0], above[1], x, y, gate, scale, *statistics, EPS, False, shift, FP32, BF16),
        (above[0], None, None, y, gate, None, None, None, EPS, False, False, FP32, BF16),
    ]
    expected = [grad for node in nodes for grad in kernel.backward(*node, (BF16,) * 3)[2:] if grad is not None]
    given = [kernel.differentiate(*node)[2] for node in nodes]
    out, last = torch.full((2, 6, 300), torch.nan, dtype=BF16), 4 - (not shift)
    kernel.sum_all([(last, given[1]), (1, given[0])], out)
    assert torch.equal(out[:, 1 : last + 1], torch.stack(expected, 1))
    assert torch.cat((out[:, :1], out[:, last + 1 :]), 1).isnan().all()


class Blocks(torch.nn.ModuleList):
    def side_by_side(self):
        return [block.adaLN_modulation[-1] for block in self]


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    made = Blocks(Block(32, 2) for _ in range(3))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    make_shadows(made, list(made.parameters()))
    return made


def gradients_of(blocks, tapped, look=lambda parts: None, create_graph=False):
    torch.manual_seed(1)
    stream, c = torch.randn(2, 40, 32, requires_grad=True), torch.randn(2, 32, requires_grad=True)
    leaves, stats, taps = [stream, c, *blocks.parameters()], None, DiversityTaps()
    with force("triton"), torch.autocast("cpu", BF16):
        every = linear.linear_of_all(c, blocks.side_by_side(), 32)
        look(every)
        for block, parts in zip(blocks, every, strict=True):
            stream, stats = block(stream, c, stats, modulation=parts)
            stream = taps.tap(stream, stats) if tapped else stream
        loss = stream.square().mean() + (taps.loss("all").total if tapped else 0)
    return torch.autograd.grad(loss, leaves, create_graph=create_graph)


@pytest.mark.parametrize(("most", "tapped"), [(12, True), (256, False)])
def test_partial_sums_that_blocks_leave_as_trained_give_the_same_bits(blocks, most, tapped, monkeypatch):
    """Of all blocks, or of two of three."""
    added = []
    run = kernel.sum_all
    monkeypatch.setattr(kernel, "sum_all", lambda left, out: added.append(len(left)) or run(left, out))
    monkeypatch.setattr(linear, "MOST_SUMS", most)
    ours = gradients_of(blocks, tapped)
    assert added == [6 if most == 12 else 9]
    monkeypatch.setattr(linear, "MOST_SUMS", 0)
    theirs = gradients_of(blocks, tapped)
    assert len(added) == 1
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("tapped", [False, True])
def test_blocks_from_a_trace_as_trained_have_the_same_bits(blocks, tapped, monkeypatch):
    """The first block runs, the second is taken down, the third runs from it."""
    ours = [gradients_of(blocks, tapped) for _ in range(2)][-1]
    found = [program for kind, program in traced._PROGRAMS.items() if kind[0].__module__ == branches.__name__]
    assert len(found) >= 4
    assert all(callable(program) for program in found), found
    monkeypatch.setattr(branches, "traced", lambda function, facts, *given: function(*facts, *given))
    assert all(map(torch.equal, ours, gradients_of(blocks, tapped)))


def test_whoever_looks_at_a_part_as_trained_sees_its_gradient(blocks):
    expected, seen = gradients_of(blocks, False), []
    found = gradients_of(blocks, False, lambda every: every[1][2].register_hook(lambda grad: seen.append(grad)))
    assert len(seen) == 1
    assert all(map(torch.equal, expected, found))
    doubled = gradients_of(blocks, False, lambda every: every[1][2].register_hook(lambda grad: 2 * grad))
    assert not torch.equal(doubled[1], expected[1])


def test_partial_sums_as_trained_have_no_second_derivative(blocks):
    _, of_condition, *_ = gradients_of(blocks, False, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(of_condition.sum(), next(blocks.parameters()), allow_unused=True)
