"""QK-norm kernels against float64 on equally rounded inputs: head widths, three types, strides, chunks, masks."""

import importlib

import pytest
import torch

from dit_fast.kernels import qk_norm as kernel
from dit_fast.ops import qk_norm

op = importlib.import_module("dit_fast.ops.qk_norm")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-6, FP16: 1e-3, BF16: 6e-3}  # relative RMS error; gradients of parameters are fp32 in every case
CASES = {  # N, T, H, d, type
    "fp32, head 64": (2, 11, 3, 64, FP32),
    "fp16, head 72": (1, 13, 2, 72, FP16),
    "bf16, head 72, two chunks and one row": (2, 43, 3, 72, BF16),
    "bf16, odd head": (3, 7, 2, 33, BF16),
    "one token, head of one": (2, 1, 1, 1, FP32),
    "fp32, widest head": (1, 3, 2, 256, FP32),
    "real width": (1, 9, 16, 72, BF16),
}
EPS = 1e-5
AFFINE = (None, None, EPS, "layer")  # cos, sin, eps, norm
FORMS = {  # norm, weights, biases, rotary
    "layer, rotary": ("layer", True, True, True),
    "layer, biases alone": ("layer", False, True, False),
    "layer, weights alone, rotary": ("layer", True, False, True),
    "rms": ("rms", True, False, False),
    "rms, rotary": ("rms", True, False, True),
    "rms, nothing learned, rotary": ("rms", False, False, True),
    "rotary": ("none", False, False, True),
}


def error(ours, exact):
    exact = exact.double()
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def make(batch, tokens, heads, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(3 * heads * width, generator=generator)
    qkv = (2 * torch.randn(batch, tokens, 3 * heads * width, generator=generator) + shift).to(dtype)
    parameters = [torch.randn(width, generator=generator) for _ in range(4)]
    grads = [torch.randn(batch, tokens, heads, width, generator=generator).to(dtype) for _ in range(3)]
    return qkv, heads, parameters, grads


def exact(qkv, heads, parameters, grads, form=AFFINE):
    """query, key, then the gradients of qkv and of the parameters stacked, by autograd in float64."""
    leaves = [None if x is None else x.double().requires_grad_() for x in (qkv, *parameters)]
    outputs = op._reference(leaves[0], heads, *leaves[1:], *form)
    there = [x for x in leaves if x is not None]
    found = torch.autograd.grad(outputs, there, [grad.double() for grad in grads])
    return outputs[0].detach(), outputs[1].detach(), found[0], torch.stack(found[1:]) if found[1:] else None


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    qkv, heads, parameters, grads = make(*CASES[name])
    compare(qkv, heads, parameters, grads, AFFINE)


@pytest.mark.parametrize("sizes", [(2, 43, 3, 72, BF16), (2, 11, 3, 20, FP32)], ids=["bf16", "fp32"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, sizes):
    norm, weights, biases, rotary = FORMS[form]
    qkv, heads, parameters, grads = make(*sizes)
    parameters = [x if here else None for x, here in zip(parameters, (weights, biases) * 2, strict=True)]
    # Tables of no rotation: the gradient is the transposed map whatever they hold.
    tables = torch.randn(2, sizes[1], sizes[3], generator=torch.Generator().manual_seed(1)).unbind(0)
    compare(qkv, heads, parameters, grads, (*(tables if rotary else (None, None)), EPS, norm))


def compare(qkv, heads, parameters, grads, form):
    expected, dtype = exact(qkv, heads, parameters, grads, form), qkv.dtype
    needs = (parameters[1] is not None, True, any(x is not None for x in parameters))
    backward = (*grads, qkv, parameters[0], parameters[2], *form, *needs)
    ours = [*kernel.forward(qkv, heads, *parameters, *form), *kernel.backward(*backward)]
    eager = [*op._forward(qkv, *parameters, *form[:2], heads, *form[2:], "torch"), *op._backward(*backward, "torch")]
    for place, (each, reference) in enumerate(zip(ours, expected, strict=True)):
        if reference is None:
            assert each is None
            continue
        assert each.dtype == (FP32 if place == 3 else dtype)
        assert each.shape == reference.shape
        assert each.is_contiguous()
        assert error(each, reference) < (1e-6 if place == 3 else LIMITS[dtype])
        if dtype == BF16:
            assert error(each, reference) <= 1.25 * error(eager[place], reference) + 1e-7


def test_parameters_in_half_precision():
    qkv, heads, parameters, grads = make(2, 5, 2, 16, BF16)
    parameters = [x.to(BF16) for x in parameters]
    expected = exact(qkv, heads, parameters, grads)
    found = kernel.forward(qkv, heads, *parameters, *AFFINE)
    found += kernel.backward(*grads, qkv, parameters[0], parameters[2], *AFFINE, True, True, True)
    for ours, reference in zip(found, expected, strict=True):
        assert error(ours, reference) < LIMITS[BF16]


def test_rows_with_a_mean_of_a_hundred_deviations_and_constant_rows():
    qkv, heads, parameters, grads = make(2, 6, 2, 24, FP32)
    qkv = (0.01 * qkv + 1).bfloat16().float()
    qkv[0, 3] = 2.5
    expected = exact(qkv, heads, parameters, grads)
    found = kernel.forward(qkv, heads, *parameters, *AFFINE)
    found += kernel.backward(*grads, qkv, parameters[0], parameters[2], *AFFINE, True, True, True)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        # A mean of 1 in fp32 has an error of 6e-8, a hundred times that relative to the deviation.
        assert error(ours, reference) < 1e-5


@pytest.mark.parametrize("width", [16, 21])
def test_any_strides_and_addresses(width):
    """Projections inside wider rows, at odd addresses, batches expanded; gradients as attention returns them."""
    batch, tokens, heads = 3, 10, 2
    plain, _, parameters, grads = make(batch, tokens, heads, width, FP32)
    row = 3 * heads * width
    buffer = torch.full((batch, tokens + 1, row + 5), torch.nan)
    views = [buffer[:, 1:, 5:], buffer[:, :-1, 1 : 1 + row]]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in grads]
    padded = [torch.full((batch, tokens + 1, heads, width + 3), torch.nan)[:, 1:, :, 2:-1].copy_(x) for x in grads]
    layouts = [turned, *([(grads, turned, padded)[(i + first) % 3][i] for i in range(3)] for first in range(3))]
    for view in views:
        view.copy_(plain)
        expected = exact(plain, heads, parameters, grads)
        for ours, reference in zip(kernel.forward(view, heads, *parameters, *AFFINE), expected, strict=False):
            assert error(ours, reference) < 1e-6
        for layout in layouts:
            found = kernel.backward(*layout, view, parameters[0], parameters[2], *AFFINE, True, True, True)
            for ours, reference in zip(found, expected[2:], strict=True):
                assert error(ours, reference) < 1e-6
    expanded, one = plain[:1].expand(batch, tokens, row), [x[:1, :1].expand_as(x) for x in grads]
    expected = exact(expanded, heads, parameters, one)
    found = kernel.forward(expanded, heads, *parameters, *AFFINE)
    found += kernel.backward(*one, expanded, parameters[0], parameters[2], *AFFINE, True, True, True)
    for ours, reference in zip(found, expected, strict=True):
        assert error(ours, reference) < 1e-6


def test_values_are_not_read_by_the_forward_and_pass_through_the_backward():
    qkv, heads, parameters, grads = make(2, 5, 2, 24, BF16)
    qkv[..., 2 * heads * 24 :] = torch.nan
    assert all(x.isfinite().all() for x in kernel.forward(qkv, heads, *parameters, *AFFINE))
    found, _ = kernel.backward(*grads, qkv, parameters[0], parameters[2], *AFFINE, True, True, False)
    assert torch.equal(found.unflatten(-1, (3, heads, 24))[:, :, 2], grads[2])


def test_gradients_that_are_not_needed():
    qkv, _, parameters, grads = make(2, 70, 2, 16, FP32)
    arguments = (*grads, qkv, parameters[0], parameters[2], *AFFINE, True)
    both = kernel.backward(*arguments, True, True)
    only_input, nothing = kernel.backward(*arguments, True, False)
    none, only_parameters = kernel.backward(*arguments, False, True)
    assert nothing is none is None
    assert torch.equal(only_input, both[0])
    assert torch.equal(only_parameters, both[1])


def test_a_bad_token_stays_alone():
    qkv, heads, parameters, _ = make(2, 5, 3, 16, FP32)
    qkv[1, 2, 16:32] = torch.inf  # the second head of the queries
    query, key = kernel.forward(qkv, heads, *parameters, *AFFINE)
    assert not query[1, 2, 1].isfinite().any()
    assert query.isfinite().sum() == query.numel() - 16
    assert key.isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_op_through_the_kernels(dtype, channels_last):
    qkv, heads, parameters, _ = make(2, 9, 3, 24, dtype)
    if not channels_last:
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    sides = []
    for backend in ("triton", "torch"):
        leaves = [x.clone().requires_grad_() for x in (qkv, *parameters)]
        query, key, value = qk_norm(leaves[0], heads, *leaves[1:], backend=backend)
        assert query.shape == (2, 3, 9, 24)
        total = (query * value.sigmoid() + key.square()).float().sum()
        sides.append([query, key, value, *torch.autograd.grad(total, leaves)])
    for ours, reference in zip(*sides, strict=True):
        assert ours.dtype == reference.dtype
        assert error(ours, reference) < LIMITS[dtype]


def test_supports_names_what_it_refuses():
    assert kernel.supports(torch.zeros(1, 2, 18, dtype=BF16), 2) == []
    most = 8 * 65535  # head rows: as many as a program of the forward has, along the second axis of a grid
    assert kernel.supports(torch.zeros(1, 1, dtype=BF16).expand(1, 2 * most, 3 * 256), 1) == []
    long = torch.zeros(1, 1, dtype=torch.float64).expand(1, most + 1, 3 * 257)
    assert [reason.split()[0] for reason in kernel.supports(long, 1)] == [
        "head",
        "torch.float64",
        str(most + 1),
    ]
