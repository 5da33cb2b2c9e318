"""A whole model with the diversity loss by what "auto" picks and by plain torch, on every device at hand."""

import pytest
import torch

from dit_fast.backend import force
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import build_model
from dit_fast.nn.linear import make_shadows
from dit_fast.nn.long_skip import keep_folded
from dit_fast.objectives import Flow
from dit_fast.ops import traced
from dit_fast.train.loss import TrainingLoss
from tests.helpers.golden import assert_close
from tests.ops.conftest import device  # noqa: F401

# precision, the stream's type, and how far loss and gradients may be from torch's: bf16 rounds in other places
KINDS = [("fp32", "fp32", 1e-5, 1e-4), ("bf16", "fp32", 2e-3, 3e-2), ("bf16", "bf16", 2e-3, 3e-2)]
CASES = [(*kind, False) for kind in KINDS] + [(*kind, True) for kind in KINDS[1:]]


@pytest.mark.parametrize(("precision", "stream", "loss_tolerance", "tolerance", "as_trained"), CASES)
def test_loss_and_gradients_are_those_of_torch_and_repeat(
    device,  # noqa: F811
    precision,
    stream,
    loss_tolerance,
    tolerance,
    as_trained,
):
    """as_trained: with the copies of weights that an engine keeps, so that halves of blocks are nodes and, on a GPU,
    run from a trace, all of the third run."""
    name, size, count = ("SiT-B/2", 16, 8) if device.type == "cuda" else ("SiT-Nano/2", 8, 3)
    torch.manual_seed(0)
    model = build_model(name, input_size=size, depth=4, skip_wiring="input", residual_dtype=stream)
    for parameter in model.parameters():  # zero-initialised outputs would hide what lies before them
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    method = DiverseDiT(DiverseDiT.Config(pairs="all"), model, None)
    loss = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0, label_dropout=0.1, precision=precision)
    loss.to(device)
    if as_trained:
        keep_folded(model, list(model.parameters()))
        make_shadows(model, list(model.parameters()))
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
    (first, gradients), _, (second, again) = run(), run(), run()
    assert_close(first, expected.cpu(), loss_tolerance)
    for key, gradient in expected_gradients.items():
        assert_close(gradients[key], gradient.cpu(), tolerance)
    assert torch.equal(first, second)
    if as_trained and device.type == "cuda":
        programs = [program for _, program in traced._PROGRAMS.items() if program is not traced._ONCE]
        assert len(programs) >= 6
        assert [program for program in programs if not callable(program)] == []
    if device.type == "cpu" or precision == "bf16":  # attention in float32 adds with atomics on a GPU
        assert [key for key in gradients if not torch.equal(gradients[key], again[key])] == []
