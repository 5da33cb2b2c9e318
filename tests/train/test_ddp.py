"""DistributedDataParallel computes what ZeRO and one process compute, and states move between them.

One start of two ranks and one plain process (`engine_worker.py`).
"""

import pytest
import torch

from tests.helpers.engines import run_engines
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.train.test_zero import TOY, _close, _state

pytestmark = pytest.mark.launch
DDP = {"engine": "ddp"}
HALF = "half-{}/checkpoints/step_00000010"
SCENARIOS = [
    {"name": "ddp", "steps": 20, "micro": 2, **DDP},
    *({"name": f"zero-{stage}", "steps": 20, "micro": 2, "stage": stage} for stage in (0, 1)),
    {"name": "half-ddp", "steps": 10, "micro": 2, **DDP},
    {"name": "half-zero", "steps": 10, "micro": 2, "stage": 3},
    {"name": "ddp-to-ddp", "steps": 20, "micro": 2, "load": HALF.format("ddp"), **DDP},
    {"name": "ddp-to-zero", "steps": 20, "micro": 2, "load": HALF.format("ddp"), "stage": 2},
    {"name": "zero-to-ddp", "steps": 20, "micro": 2, "load": HALF.format("zero"), **DDP},
    {"name": "bf16", "steps": 3, "precision": "bf16", **DDP},
    {"name": "nan", "steps": 4, "poisoned": [2], **DDP},
    {"name": "toy", "steps": 5, "micro": 2, **TOY, **DDP},
]
ALONE = [{"name": "toy-alone", "steps": 5, "micro": 4, **TOY}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def results(folder):
    found = run_engines(folder / "ranks.json", folder, SCENARIOS, 2)
    return found | run_engines(folder / "alone.json", folder, ALONE)


@pytest.mark.parametrize("stage", [0, 1])
def test_twenty_steps_have_the_losses_of_zero(results, folder, stage):
    assert results["ddp"]["losses"] == pytest.approx(results[f"zero-{stage}"]["losses"], rel=1e-6)
    assert results["ddp"]["norms"] == pytest.approx(results[f"zero-{stage}"]["norms"], rel=1e-5)
    _close(folder, "ddp", f"zero-{stage}", 20, 2e-5)


def test_a_resumed_run_has_the_same_bits(results, folder):
    assert results["ddp-to-ddp"]["losses"] == results["ddp"]["losses"][10:]
    once, resumed = _state(folder, "ddp", 20), _state(folder, "ddp-to-ddp", 20)
    assert once.keys() == resumed.keys()
    assert all(torch.equal(once[name], resumed[name]) for name in once)


@pytest.mark.parametrize("name", ["ddp-to-zero", "zero-to-ddp"])
def test_states_move_to_zero_and_back(results, folder, name):
    assert results[name]["losses"] == pytest.approx(results["ddp"]["losses"][10:], rel=2e-6)
    assert results[name]["optimizer_step"] == 20
    _close(folder, name, "ddp", 20, 2e-5)


def test_bf16_trains(results):
    assert results["bf16"]["losses"] == pytest.approx(results["ddp"]["losses"][:3], rel=2e-3)
    assert results["bf16"]["losses"] != results["ddp"]["losses"][:3]


def test_a_step_without_finite_gradient_is_applied_on_no_rank(results):
    assert results["nan"]["applied"] == [True, True, False, True]
    assert results["nan"]["finite"]


def test_missing_gradients_and_untrained_state_are_those_of_one_process(results, folder):
    expected, found = _state(folder, "toy-alone", 5), _state(folder, "toy", 5)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-7, msg=name)
