"""Training with what "auto" picks and with the torch reference forced for every op: the same curve."""

import pytest
import torch

from dit_fast import backend
from dit_fast.diffusion import flow_loss
from dit_fast.models import build_model
from dit_fast.ops import diversity_loss
from tests.helpers.golden import assert_close

STEPS = 50


def train(wiring, autocast):
    torch.manual_seed(0)
    model = build_model(
        "SiT-S/2", input_size=8, hidden_size=48, depth=4, num_heads=2, num_classes=5, skip_wiring=wiring, qk_norm=True,
        label_dropout=0.0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(5, 4, 8, 8, generator=generator)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(0, 5, (8,), generator=generator)
        latents = centres[labels] + 0.1 * torch.randn(8, 4, 8, 8, generator=generator)
        found = {}

        def velocity(x, t, y, found=found):
            v, found["features"] = model(x, t, y, taps=range(4))
            return v

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = flow_loss(velocity, latents, labels, generator=generator).mean()
        loss = loss + 0.1 * diversity_loss(list(found["features"].values())).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("wiring", "autocast", "tolerance"), [("output", False, 2e-6), ("input", False, 2e-6), ("output", True, 2e-3)]
)
def test_fifty_steps(wiring, autocast, tolerance):
    """Relative difference of the losses of all steps; fp32 differs by the order of sums, bf16 by whole roundings."""
    losses, parameters = train(wiring, autocast)
    with backend.force("torch"):
        expected, expected_parameters = train(wiring, autocast)
    assert expected[-5:].mean() < 0.93 * expected[:5].mean()
    assert_close(losses, expected, tolerance)
    assert_close(parameters, expected_parameters, 20 * tolerance)
