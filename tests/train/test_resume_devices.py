"""Steps that are run again from a saved state give the same bits, on every device, at both lengths of sequence.

On an H200 torch's attention does in bf16 at 256 tokens, and neither at 1024 nor in float32, where engine.deterministic
takes another.
"""

import pytest
import torch

from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.models import build_model
from dit_fast.objectives import Flow
from dit_fast.runs import TrainConfig
from dit_fast.train.__main__ import main
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.optim import STATES
from dit_fast.world import World
from tests.helpers.toy_runs import arguments
from tests.ops.conftest import device  # noqa: F401

TOKENS = {"cpu": (4, 8), "cuda": (32, 64)}  # input sizes: 256 and 1024 tokens on a GPU


@pytest.fixture
def deterministic(monkeypatch):
    """Sets what engine.deterministic does (train/__main__.py)."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("longer", "precision"), [(0, "bf16"), (1, "bf16"), (0, "fp32")])
def test_steps_from_a_saved_state_have_the_same_bits(device, longer, precision, deterministic):  # noqa: F811
    deterministic(bool(longer) or precision == "fp32")
    size, cuda = TOKENS[device.type][longer], device.type == "cuda"
    torch.manual_seed(0)
    model = build_model("SiT-XL/2" if cuda else "SiT-Nano/2", input_size=size, depth=4, skip_wiring="input")
    method = DiverseDiT(DiverseDiT.Config(pairs="all"), model, None)
    loss = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0, precision=precision)
    engine = SingleEngine(loss, TrainConfig(), World(0, 1, device))
    for module in model.parameters():  # zero-initialised outputs would hide the backward of what lies before them
        if module.requires_grad:
            module.data.add_(torch.randn_like(module), alpha=0.02)

    def run(first):
        for step in range(first, first + 3):
            generator = torch.Generator(device).manual_seed(step)
            batch = {
                "moments": torch.randn(8, 2, 4, size, size, generator=generator, device=device),
                "label": torch.arange(8, device=device),
                "position": torch.arange(8 * step, 8 * step + 8, device=device),
            }
            engine.train_step([batch], step, 1e-3)

    def state():
        return {kind: {name: x.clone() for name, x in engine.full_state(kind)} for kind in ("model", *STATES)}

    run(0)
    saved, steps = state(), engine.applied_steps()
    run(3)
    expected = state()
    model.load_state_dict(saved["model"], strict=False)
    for kind in STATES:
        engine.load_full_state(kind, saved[kind].__getitem__)
    engine.set_applied_steps(steps)
    run(3)
    assert engine.applied_steps() == 6  # not equal for want of a finite gradient
    for kind, tensors in state().items():
        for name, x in tensors.items():
            assert torch.equal(x, expected[kind][name]), f"{kind} of {name}"


def test_the_setting_takes_algorithms_that_repeat(shards, tmp_path, deterministic):
    assert main(arguments(shards, tmp_path / "run", "run.steps=1", "engine.deterministic=true")) == 0
    assert torch.are_deterministic_algorithms_enabled()
