"""Flow matching on every device at hand."""

import pytest
import torch

from dit_fast.diffusion import Path
from dit_fast.ops import flow_error, flow_noised
from dit_fast.philox import Stream, normal
from tests.helpers.cases import loop_over
from tests.helpers.devices import TOLERANCE
from tests.helpers.golden import assert_close

T, POSITIONS = torch.tensor([0.0, 0.37, 1.0]), torch.tensor([5, 2**32 - 1, 2**40])


def make(dtype):
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(3, 4, 19, 21, generator=generator)
    return torch.randn(latents.shape, generator=generator).to(dtype), latents


@loop_over("path", ["linear", "cosine"])
@loop_over("dtype", list(TOLERANCE))
def test_values_and_gradients(dtype, path, device):
    prediction, latents = make(dtype)
    noise = normal(9, POSITIONS, Stream.NOISE, tuple(latents.shape[1:])).double()
    wide = [x.double().requires_grad_() for x in (prediction, latents)]
    noised, target = Path(path).interpolate(wide[1], noise, T.double())
    exact = (wide[0] - target).square().flatten(1).mean(1)
    expected = torch.autograd.grad(exact.mean(), wide)
    leaves = [x.to(device).requires_grad_() for x in (prediction, latents)]
    key = (T.to(device), POSITIONS.to(device), 9, path)
    value = flow_error(*leaves, *key)
    assert_close(flow_noised(leaves[1], *key).detach().cpu(), noised.detach(), TOLERANCE[torch.float32][0])
    assert_close(value.detach().cpu(), exact.detach(), TOLERANCE[torch.float32][0])
    for x, ours, theirs in zip(leaves, torch.autograd.grad(value.mean(), leaves), expected, strict=True):
        assert ours.dtype == x.dtype
        assert ours.device.type == device.type
        assert_close(ours.cpu(), theirs, TOLERANCE[x.dtype][1])


def test_no_wait_for_the_device(device):
    """CUDA itself raises where the host waits for it."""
    if device.type != "cuda":
        pytest.skip("only CUDA counts waits")
    prediction, latents = (x.to(device) for x in make(torch.bfloat16))
    t, positions = T.to(device), POSITIONS.to(device)

    def step():
        leaf = prediction.clone().requires_grad_()
        flow_noised(latents, t, positions, 9)
        flow_error(leaf, latents, t, positions, 9).mean().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
