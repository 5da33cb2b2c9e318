"""REPA's cosine kernels against float64 on equally rounded inputs: odd sizes, three types, strides, floors, ticket."""

from types import SimpleNamespace

import pytest
import torch

from dit_fast.errors import ConfigError
from dit_fast.kernels import repa_cosine as kernel
from dit_fast.ops import repa_cosine

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-6, FP16: 1e-3, BF16: 6e-3}  # relative RMS error of a gradient, which is rounded to its type
CASES = {  # tokens, width, types of prediction and target
    "fp32": (37, 96, FP32, FP32),
    "bf16": (37, 200, BF16, BF16),
    "fp16 and fp32": (19, 130, FP16, FP32),
    "bf16 and fp32, one token over a chunk": (kernel.CHUNK + 1, 40, BF16, FP32),
    "fp32 and bf16": (5, 33, FP32, BF16),
    "one number": (1, 1, FP32, FP32),
    "real width": (9, 768, BF16, FP32),
}


def error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def make(tokens, width, *types, seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, width, generator=generator)
    return [(common + torch.randn(tokens, width, generator=generator)).to(dtype) for dtype in types]


def with_gradients(prediction, target, backend="torch", upstream=None):
    leaves = [x.detach().requires_grad_() for x in (prediction, target)]
    value = repa_cosine(*(x[None] for x in leaves), backend=backend)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


def exact(prediction, target):
    return with_gradients(prediction.double(), target.double())


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name):
    inputs = make(*CASES[name])
    ours, eager, expected = with_gradients(*inputs, "triton"), with_gradients(*inputs), exact(*inputs)
    assert ours[0].dtype == FP32
    assert error(ours[0], expected[0]) < 1e-6
    for x, grad, plain, reference in zip(inputs, ours[1:], eager[1:], expected[1:], strict=True):
        assert grad.dtype == x.dtype
        if inputs[0].numel() == 1:  # a cosine of one number cannot turn
            assert grad.abs() < 1e-6
            continue
        assert error(grad, reference) < LIMITS[x.dtype]
        if x.dtype == BF16:
            assert error(grad, reference) <= 1.25 * error(plain, reference)


def test_what_is_kept_per_token():
    p, q = make(35, 70, BF16, FP32)
    _, saved = kernel.forward(p, q)
    units = [torch.nn.functional.normalize(x.double(), dim=1) for x in (p, q)]
    exact_values = [1 / p.double().norm(dim=1), 1 / q.double().norm(dim=1), (units[0] * units[1]).sum(1)]
    assert saved.shape == (3, 35)
    for ours, reference in zip(saved, exact_values, strict=True):
        assert error(ours, reference) < 1e-6


def test_many_partial_sums(monkeypatch):
    """More partial sums than are added at once; the last program adds them all, whatever SUMMANDS is."""
    monkeypatch.setattr(kernel, "CHUNK", 2)
    monkeypatch.setattr(kernel, "SUMMANDS", 16)
    p, q = make(75, 24, FP32, FP32)
    assert error(kernel.forward(p, q)[0], exact(p, q)[0]) < 1e-6


def test_the_ticket_is_left_as_it_was_found(monkeypatch):
    ticket = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(kernel, "_ticket", lambda device: ticket)
    for tokens in (90, 3, 50):
        p, q = make(tokens, 16, FP32, FP32)
        assert error(kernel.forward(p, q)[0], exact(p, q)[0]) < 1e-6
        assert ticket.item() == 0


def test_launches_that_may_overlap_share_no_ticket(monkeypatch):
    stream, capturing = [7], [False]
    monkeypatch.setattr(kernel, "_tickets", {})
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device, new=torch.zeros, **options: new(*sizes, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream[0]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    first = kernel._ticket(torch.device("cuda", 0))
    assert kernel._ticket(torch.device("cuda", 0)) is first
    assert kernel._ticket(torch.device("cuda", 1)) is not first
    stream[0] = 8
    assert kernel._ticket(torch.device("cuda", 0)) is not first
    stream[0], capturing[0] = 7, True  # a graph may be replayed beside this stream
    assert kernel._ticket(torch.device("cuda", 0)) is not first


@pytest.mark.parametrize(("needs", "unused"), [((True, False), 1), ((False, True), 0)])
def test_only_needed_gradients_are_written(needs, unused):
    p, q = make(21, 50, FP32, BF16)
    _, saved = kernel.forward(p, q)
    before = [p.clone(), q.clone()]
    grads = kernel.backward(torch.tensor(2.0), p, q, saved, needs)
    assert grads[unused] is None
    assert error(grads[1 - unused], 2 * exact(p, q)[2 - unused]) < LIMITS[(p, q)[1 - unused].dtype]
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_any_strides_addresses_and_upstream():
    torch.manual_seed(0)
    # An odd offset and row stride: no 128-bit access is possible. The target is transposed, then one expanded row.
    buffer = torch.randn(23, 107)
    p = buffer[:, 1:49]
    for q in (torch.randn(48, 23).T, torch.randn(1, 48).expand(23, 48), buffer[:, 50:98]):
        upstream = torch.tensor([0.7]).expand(3)[1]
        ours = with_gradients(p, q, "triton", upstream)
        expected = exact(p, q)
        assert abs(ours[0] - expected[0]) < 1e-7  # a mean of cosines of both signs
        for each, reference in zip(ours[1:], expected[1:], strict=True):
            assert error(each, 0.7 * reference) < 1e-6


def test_what_lies_beyond_the_rows_is_not_read():
    p, q = (torch.full((21, 64), torch.nan) for _ in range(2))
    for x, y in zip((p, q), make(20, 50, FP32, FP32), strict=True):
        x[:20, :50] = y
    ours = with_gradients(p[:20, :50], q[:20, :50], "triton")
    assert all(torch.isfinite(x).all() for x in ours)


@pytest.mark.usefixtures("approximate_division")
def test_tokens_below_the_norm_floor():
    p, q = make(20, 32, FP32, FP32)
    p[4] = 0
    p[7] *= 7e-13 / p[7].norm()  # close to the floor: far below it, a projection would not show
    q[9] *= 9e-13 / q[9].norm()
    q[11] *= 1e-9
    ours, expected = with_gradients(p, q, "triton"), exact(p, q)
    assert error(ours[0], expected[0]) < 1e-6
    for grad, reference in zip(ours[1:], expected[1:], strict=True):  # by token: they differ by twelve decades
        assert ((grad - reference).norm(dim=1) <= 1e-6 * reference.norm(dim=1)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_tokens_show(bad):
    p, q = make(10, 32, FP32, FP32)
    p[3, 5] = bad
    value, saved = kernel.forward(p, q)
    assert value.isnan()
    assert saved[2].isnan().tolist() == [i == 3 for i in range(10)]


def test_derivative_along_a_direction():
    p, q, dp, dq = make(12, 20, FP32, FP32, FP32, FP32)
    for directions in ((dp, dq), (dp, torch.zeros_like(dq))):
        sides = [
            torch.func.jvp(
                lambda a, b, backend=backend: repa_cosine(a[None], b[None], backend),
                tuple(x.to(dtype) for x in (p, q)),
                tuple(x.to(dtype) for x in directions),
            )[1]
            for backend, dtype in (("triton", FP32), ("torch", torch.float64))
        ]
        assert error(*sides) < 1e-5


def test_supports_names_what_it_refuses():
    assert kernel.supports(*make(4, 32, BF16, FP32)) == []
    reasons = kernel.supports(torch.zeros(4, 5000, dtype=torch.float64), torch.zeros(4, 5000))
    assert [reason.split()[0] for reason in reasons] == ["width", "prediction"]
    with pytest.raises(ConfigError, match=r"prediction is torch\.float64"):
        repa_cosine(torch.zeros(1, 4, 3, dtype=torch.float64), torch.zeros(1, 4, 3), backend="triton")
