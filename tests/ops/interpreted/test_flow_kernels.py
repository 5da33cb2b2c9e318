"""Flow-matching kernels against float64 with the torch twin's noise: both paths, three types, strides, odd sizes."""

import math

import pytest
import torch
from torch import nn

from dit_fast import philox
from dit_fast.errors import UserError
from dit_fast.kernels import flow as kernel
from dit_fast.objectives import Flow, flow
from dit_fast.ops import flow_error, flow_noised
from dit_fast.ops.draws import Key
from dit_fast.train.loss import TrainingLoss

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-6, FP16: 1e-3, BF16: 6e-3}  # relative RMS error of a gradient, which is rounded to its type
TIMES = torch.tensor([0.0, 0.3, 0.5, 0.500001, 0.77, 1.0])
POSITIONS = torch.tensor([0, 3, 2**32 - 1, 2**32, 2**62 + 12345, 17])
SHAPES = {"one element": (1,), "odd": (3, 7, 5), "one over a block": (4 * kernel.BLOCK + 1,), "real": (4, 32, 32)}


def error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def make(shape, *types, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(TIMES), *shape, generator=generator).to(dtype) for dtype in types]


def exact(latents, seed, path):
    """x_t and v in float64, from the definition."""
    noise = philox.normal(seed, POSITIONS, philox.Stream.NOISE, tuple(latents.shape[1:])).double()
    t = TIMES.double().reshape(-1, *[1] * (latents.dim() - 1))
    x = latents.double()
    if path == "linear":
        return (1 - t) * x + t * noise, noise - x
    cosine, sine = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    return cosine * x + sine * noise, math.pi / 2 * (cosine * noise - sine * x)


def exact_error(prediction, latents, seed, path):
    return (prediction.double() - exact(latents, seed, path)[1]).square().flatten(1).mean(1)


def key(path, seed=5):
    return TIMES, POSITIONS, seed, path


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("shape", SHAPES)
def test_noised(shape, path):
    (latents,) = make(SHAPES[shape], FP32)
    ours = flow_noised(latents, *key(path), backend="triton")
    assert ours.shape == latents.shape
    assert ours.dtype == FP32
    for row, reference in zip(ours, exact(latents, 5, path)[0], strict=True):
        assert error(row, reference) < 1e-6


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("shape", "prediction", "latents"),
    [
        ("real", BF16, FP32),
        ("odd", FP16, FP32),
        ("one over a block", FP32, FP32),
        ("odd", FP32, BF16),
        ("odd", BF16, BF16),
    ],
)
def test_error_and_gradients(shape, prediction, latents, path):
    p, x = make(SHAPES[shape], prediction, latents)
    upstream = torch.linspace(0.5, 2, len(TIMES))
    sides = []
    for backend, inputs in (("triton", (p, x)), ("torch", (p, x)), (None, (p.double(), x.double()))):
        leaves = [each.clone().requires_grad_() for each in inputs]
        value = flow_error(*leaves, *key(path), backend=backend) if backend else exact_error(*leaves, 5, path)
        sides.append((value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))))
    ours, eager, reference = sides
    assert ours[0].dtype == FP32
    assert error(ours[0], reference[0]) < 1e-6
    for place, dtype in ((1, prediction), (2, latents)):
        assert ours[place].dtype == dtype
        assert ours[place].shape == p.shape
        if place == 2 and path == "cosine":
            assert ours[place][0].abs().max() == 0  # sin 0: the target does not depend on the latents
        assert error(ours[place], reference[place]) < LIMITS[dtype]
        if dtype == BF16:
            assert error(ours[place], reference[place]) <= 1.25 * error(eager[place], reference[place])


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_gradient_of_the_interpolant(path):
    (x,) = make((3, 5), FP32)
    direction = torch.randn(x.shape)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    ours = torch.autograd.grad(flow_noised(leaf, *key(path), backend="triton"), leaf, direction)[0]
    reference = torch.autograd.grad(exact(wide, 5, path)[0], wide, direction.double())[0]
    assert error(ours, reference) < 1e-6


@pytest.mark.parametrize("seed", [0, 1234, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed(seed):
    p, x = make((2, 9), FP32, FP32)
    assert error(flow_noised(x, *key("linear", seed), backend="triton"), exact(x, seed, "linear")[0]) < 1e-6
    assert error(flow_error(p, x, *key("linear", seed), backend="triton"), exact_error(p, x, seed, "linear")) < 1e-6


def test_error_at_the_target_is_that_of_the_noise():
    """The noise of the error is that of the interpolant: at t = 1 the path ends at it."""
    (x,) = make((4, 40), FP32)
    t = torch.ones(len(TIMES))
    noise = flow_noised(x, t, POSITIONS, 5, backend="triton")
    value = flow_error(noise - x, x, t, POSITIONS, 5, backend="triton")
    assert value.max() < 1e-12


def test_only_needed_gradients_are_written():
    p, x = make((70,), FP32, BF16)
    draw = (TIMES, POSITIONS, 5, philox.Stream.NOISE, "cosine")
    upstream = torch.ones(len(TIMES))
    both = kernel.backward(upstream, p, x, *draw, (True, True))
    before = p.clone(), x.clone()
    only_prediction = kernel.backward(upstream, p, x, *draw, (True, False))
    only_latents = kernel.backward(upstream, p, x, *draw, (False, True))
    assert only_prediction[1] is None
    assert only_latents[0] is None
    assert torch.equal(only_prediction[0], both[0])
    assert torch.equal(only_latents[1], both[1])
    assert torch.equal(p, before[0])
    assert torch.equal(x, before[1])


def test_any_strides_and_strided_gradients():
    """A model with two channels of variance on top, latents transposed or expanded, t and positions strided."""
    p = torch.randn(6, 8, 5, 5, generator=torch.Generator().manual_seed(1))[:, :3]
    for x in (make((5, 5, 3), FP32)[0].permute(0, 3, 1, 2), make((3, 5, 5), FP32)[0][:1].expand(6, 3, 5, 5)):
        leaf = p.detach().requires_grad_()
        strided = torch.stack([TIMES, TIMES], 1)[:, 0], torch.stack([POSITIONS, POSITIONS], 1)[:, 1]
        value = flow_error(leaf, x, *strided, 5, "cosine", backend="triton")
        assert error(value, exact_error(p, x, 5, "cosine")) < 1e-6
        wide = p.double().requires_grad_()
        for upstream in (torch.tensor(0.7).expand(6), torch.arange(12.0)[::2]):
            (grad,) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
            (reference,) = torch.autograd.grad(exact_error(wide, x, 5, "cosine"), wide, upstream.double())
            assert error(grad, reference) < 1e-6
        noised = flow_noised(x, *strided, 5, "cosine", backend="triton")
        assert error(noised, exact(x, 5, "cosine")[0]) < 1e-6


def test_what_lies_beyond_the_rows_is_not_read():
    p, x = (torch.full((len(TIMES) + 1, 100), torch.nan) for _ in range(2))
    for whole, part in zip((p, x), make((90,), FP32, FP32), strict=True):
        whole[: len(TIMES), :90] = part
    p, x = (whole[: len(TIMES), :90].detach().requires_grad_() for whole in (p, x))
    value = flow_error(p, x, *key("linear"), backend="triton")
    assert all(torch.isfinite(each).all() for each in (value, *torch.autograd.grad(value.sum(), (p, x))))


def test_a_sample_that_is_not_finite_shows_alone():
    p, x = make((30,), FP32, FP32)
    p[2, 7] = torch.nan
    value = flow_error(p, x, *key("linear"), backend="triton")
    assert value.isnan().tolist() == [i == 2 for i in range(len(TIMES))]


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_derivatives_along_a_direction(path):
    p, x, dp, dx = make((3, 4), FP32, FP32, FP32, FP32)
    for function in (
        lambda p, x, backend: flow_error(p, x, *key(path), backend=backend),
        lambda p, x, backend: flow_noised(x * p, *key(path), backend=backend),
        lambda p, x, backend: flow_error(p, x.detach() * 2, *key(path), backend=backend),
    ):
        sides = [
            torch.func.jvp(
                lambda p, x, backend=backend: function(p, x, backend),  # noqa: B023 (called at once)
                tuple(each.to(dtype) for each in (p, x)),
                tuple(each.to(dtype) for each in (dp, dx)),
            )[1]
            for backend, dtype in (("triton", FP32), ("torch", torch.float64))
        ]
        assert error(*sides) < 1e-5
    with pytest.raises(UserError, match="t has no tangent here"):
        torch.func.jvp(lambda t: flow_noised(x, t, POSITIONS, 5, path, "triton"), (TIMES,), (TIMES,))


def test_supports_names_what_it_refuses():
    assert kernel.supports(prediction=torch.zeros(2, 3, dtype=BF16), latents=torch.zeros(2, 3)) == []
    long = torch.zeros(2, 1).expand(2, 1024 * 65535 + 1)
    assert kernel.supports(latents=long[:, 1:]) == []
    assert "67107841 elements" in kernel.supports(latents=long)[0]
    assert kernel.supports(latents=torch.zeros(2, 3).double()) == [
        "latents is torch.float64, not float32, bfloat16 or float16"
    ]


class Scale(nn.Module):
    """As much of a model as the objective asks for."""

    depth, hidden_size, num_tokens, in_channels, null_label, times = 1, 1, 1, 3, 10, 1
    learns_variance = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 1, 8))

    def forward(self, x, t, y, taps):
        return self.weight * x


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_trainers_objective(path, monkeypatch):
    """The kernels' noise against the generator's in torch: the loss, its gradient, and no tensor of noise."""
    generator = torch.Generator().manual_seed(0)
    moments = torch.rand(4, 2, 3, 8, 8, generator=generator)
    batch = {"moments": moments, "label": torch.arange(4), "position": torch.arange(4) + 2**33}
    streams, normal = [], Key.normal
    monkeypatch.setattr(Key, "normal", lambda key, stream, shape: streams.append(stream) or normal(key, stream, shape))
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(flow, "draws_noise_in_registers", lambda latents: False)
        model = Scale()
        run = TrainingLoss(model, Flow(Flow.Config(path=path), model), seed=2**63 + 5)
        loss, _ = run(batch, 0)
        assert (philox.Stream.NOISE in streams) is not fused
        loss.backward()
        results.append((loss.detach(), run.model.weight.grad))
    for ours, plain in zip(*results, strict=True):
        assert error(ours, plain) < 1e-6
