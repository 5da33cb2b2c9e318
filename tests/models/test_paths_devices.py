"""A whole model with the diversity loss by what "auto" picks and by plain torch, on every device at hand."""

import pytest
import torch

from dit_fast.backend import force
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import build_model
from dit_fast.objectives import Flow
from dit_fast.train.loss import TrainingLoss
from tests.helpers.golden import assert_close
from tests.ops.conftest import device  # noqa: F401

# precision, the stream's type, and how far loss and gradients may be from torch's: bf16 rounds in other places
KINDS = [("fp32", "fp32", 1e-5, 1e-4), ("bf16", "fp32", 2e-3, 3e-2), ("bf16", "bf16", 2e-3, 3e-2)]


@pytest.mark.parametrize(("precision", "stream", "loss_tolerance", "tolerance"), KINDS)
def test_loss_and_gradients_are_those_of_torch_and_repeat(device, precision, stream, loss_tolerance, tolerance):  # noqa: F811
    name, size, count = ("SiT-B/2", 16, 8) if device.type == "cuda" else ("SiT-Nano/2", 8, 3)
    torch.manual_seed(0)
    model = build_model(name, input_size=size, depth=4, skip_wiring="input", residual_dtype=stream)
    for parameter in model.parameters():  # zero-initialised outputs would hide what lies before them
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    method = DiverseDiT(DiverseDiT.Config(pairs="all"), model, None)
    loss = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0, label_dropout=0.1, precision=precision)
    loss.to(device)
    batch = {
        "moments": torch.randn(count, 2, 4, size, size).to(device),
        "label": torch.arange(count, device=device),
        "position": torch.arange(count, device=device),
    }

    def run():
        model.zero_grad()
        total, _ = loss(batch, 0)
        total.backward()
        gradients = {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}
        return total.detach(), gradients

    with force("torch"):
        expected, expected_gradients = run()
    (first, gradients), (second, again) = run(), run()
    assert_close(first, expected.cpu(), loss_tolerance)
    for key, gradient in expected_gradients.items():
        assert_close(gradients[key], gradient.cpu(), tolerance)
    assert torch.equal(first, second)
    if device.type == "cpu" or precision == "bf16":  # attention in float32 adds with atomics on a GPU
        assert [key for key in gradients if not torch.equal(gradients[key], again[key])] == []
