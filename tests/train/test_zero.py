"""The contract with DeepSpeed: every ZeRO stage computes what one plain process computes, and states move between all.

All of it comes from one start of two ranks and one plain process (`engine_worker.py`).
"""

import pytest
import torch

from tests.helpers.engines import run_engines
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import tensors

STAGES = (0, 1, 2, 3)
# A teacher that keeps half of itself: whether it follows the weights shows at once.
SRA = {"methods": {"sra": {"student_depth": 1, "teacher_depth": 2, "decay": 0.5, "distance": "smooth_l1"}}}
TOY = {"toy": {"steps_of_b": [0]}, "poisoned": [3]}
SECOND = "toy-{}/checkpoints/step_00000002"
READS = {"plain": {}, "compiled": {"compile": True}}
READS |= {"full": {"recompute": "full"}, "both": {"compile": True, "recompute": "full"}}

BEFORE = [{"name": "fp32-single", "steps": 6}]
TWO_RANKS = [
    *({"name": f"fp32-{stage}", "stage": stage, "steps": 6, "micro": 2} for stage in STAGES),
    *({"name": f"bf16-{stage}", "stage": stage, "steps": 6, "precision": "bf16"} for stage in STAGES),
    *({"name": f"nan-{stage}", "stage": stage, "steps": 4, "poisoned": [2]} for stage in STAGES),
    *(
        {"name": f"inf-{kind}-{stage}", "stage": stage, "steps": 1, "broken": kind}
        for stage, kind in [(0, "model"), (1, "exp_avg_sq"), (2, "model"), (3, "ema")]
    ),
    *({"name": f"toy-{stage}", "stage": stage, "steps": 5, "micro": 2, **TOY} for stage in STAGES),
    *(
        {"name": f"toy-{stage}-on", "stage": stage, "steps": 5, "micro": 2, "load": SECOND.format(stage), **TOY}
        for stage in STAGES
    ),
    {"name": "sra-start", "stage": 3, "steps": 0, **SRA},
    *({"name": f"sra-{stage}", "stage": stage, "steps": 4, "micro": 2, "poisoned": [3], **SRA} for stage in STAGES),
    *({"name": f"reads-{name}", "stage": 3, "steps": 3, **how} for name, how in READS.items()),
    *(
        {"name": f"{which}-{stage}", "stage": stage, "steps": 3, "recompute": which, "compile": stage == 2}
        for stage in STAGES[:3]
        for which in ("selective", "full")
    ),
    *(
        {"name": f"{how}-{stage}", "stage": stage, "precision": "bf16", "write": how, "bare": how == "bare"}
        for stage in STAGES
        for how in ("copy", "load", "bare")
    ),
    {"name": "half-1", "stage": 1, "steps": 3},
    {"name": "half-3", "stage": 3, "steps": 3},
    {"name": "1-to-3", "stage": 3, "steps": 6, "load": "half-1/checkpoints/step_00000003"},
    {"name": "3-to-2", "stage": 2, "steps": 6, "load": "half-3/checkpoints/step_00000003"},
    {"name": "3-to-0", "stage": 0, "steps": 6, "load": "half-3/checkpoints/step_00000003"},
    {"name": "one-to-1", "stage": 1, "steps": 6, "load": "fp32-single/checkpoints/step_00000006"},
]
AFTER = [
    {"name": "bf16-single", "steps": 6, "precision": "bf16"},
    {"name": "accumulated", "steps": 6, "micro": 2},
    {"name": "clipless", "steps": 6, "clip": 0.0},
    {"name": "nan-single", "steps": 4, "poisoned": [2]},
    {"name": "toy-single", "steps": 5, "micro": 4, **TOY},
    {"name": "toy-single-on", "steps": 5, "micro": 4, "load": SECOND.format("single"), **TOY},
    {"name": "sra-single", "steps": 4, "poisoned": [3], **SRA},
    {"name": "sra-before", "steps": 3, **SRA},
    {"name": "reads-single", "steps": 3},
    {"name": "2-ranks-to-one", "steps": 6, "load": "half-1/checkpoints/step_00000003"},
    {"name": "3-sharded-to-one", "steps": 6, "load": "half-3/checkpoints/step_00000003"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def results(folder):
    found = run_engines(folder / "before.json", folder, BEFORE)
    found |= run_engines(folder / "ranks.json", folder, TWO_RANKS, 2)
    return found | run_engines(folder / "after.json", folder, AFTER)


def _state(folder, name, steps):
    return tensors(folder / name, steps)


def _close(folder, first, second, steps, rtol):
    """Weights, EMA and moments agree in norm; the same names and shapes are there."""
    a, b = _state(folder, first, steps), _state(folder, second, steps)
    assert a.keys() == b.keys()
    for kind in ("model", "ema", "optim/exp_avg.", "optim/exp_avg_sq."):
        x, y = (torch.cat([s[key].double().flatten() for key in sorted(s) if key.startswith(kind)]) for s in (a, b))
        assert ((x - y).norm() / y.norm()).item() <= rtol, kind


pytestmark = pytest.mark.launch


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_stages_equal_one_process(results, folder, stage):
    """Two ranks with accumulation against one batch in one process; only the order of summation differs."""
    assert results[f"fp32-{stage}"]["losses"] == pytest.approx(results["fp32-single"]["losses"], rel=1e-6)
    assert results[f"fp32-{stage}"]["norms"] == pytest.approx(results["fp32-single"]["norms"], rel=1e-5)
    _close(folder, f"fp32-{stage}", "fp32-single", 6, 2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stages_equal_one_process(results, stage):
    assert results[f"bf16-{stage}"]["losses"] == pytest.approx(results["bf16-single"]["losses"], rel=2e-3)
    assert results[f"bf16-{stage}"]["losses"] != results[f"fp32-{stage}"]["losses"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_weight_written_behind_the_optimizers_back_leaves_no_stale_copy(results, stage):
    copied, loaded, bare = (results[f"{how}-{stage}"] for how in ("copy", "load", "bare"))
    assert copied["losses"] == loaded["losses"] == bare["losses"]
    assert bare["kept"] == [0, 0]
    assert all(copied["kept"]) is all(loaded["kept"]) is (stage < 3)  # which holds no weight whole


def test_accumulation_equals_one_big_batch(results, folder):
    assert results["accumulated"]["losses"] == pytest.approx(results["fp32-single"]["losses"], rel=1e-6)
    _close(folder, "accumulated", "fp32-single", 6, 2e-5)


def test_clipping_acts(results):
    assert results["clipless"]["norms"][0] == results["fp32-single"]["norms"][0]
    assert max(results["fp32-single"]["norms"]) > 1
    assert results["clipless"]["losses"][-1] != results["fp32-single"]["losses"][-1]


@pytest.mark.parametrize("stage", [*STAGES, "single"])
def test_a_step_without_finite_gradient_is_not_applied(results, folder, stage):
    """A NaN on one rank at step 2 of 4: all ranks skip it, in stage 0 too, where DeepSpeed alone would not."""
    result = results[f"nan-{stage}"]
    assert result["applied"] == [True, True, False, True]
    assert result["finite"]
    assert result["optimizer_step"] == 3
    assert all(tensor.isfinite().all() for tensor in _state(folder, f"nan-{stage}", 4).values())


@pytest.mark.parametrize(("stage", "kind"), [(0, "model"), (1, "exp_avg_sq"), (2, "model"), (3, "ema")])
def test_what_is_not_finite_on_one_rank_is_saved_by_none(results, folder, stage, kind):
    """Rank 0 says so too, though it is rank 1's share (stage 0: its copy) that is broken."""
    name = f"inf-{kind}-{stage}"
    assert results[name]["diverged"].startswith(f"{kind} of '")
    assert results[name]["diverged"].endswith("is not finite after step 1, so no checkpoint was written")
    assert not list((folder / name / "checkpoints").iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_gradient_is_zero(folder, results, stage):
    """In one process and in every stage: a layer that is used no more keeps moving by its moments, and its average
    and a teacher follow, in applied steps. DeepSpeed's stage 3 alone would apply the layer's last gradient again."""
    expected, found = _state(folder, "toy-single", 5), _state(folder, f"toy-{stage}", 5)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-7, msg=name)
    assert not torch.equal(expected["rest/teacher.b.weight"], _state(folder, "toy-single", 2)["rest/teacher.b.weight"])


@pytest.mark.parametrize("stage", [*STAGES, "single"])
def test_untrained_state_moves_and_survives(results, folder, stage):
    """A count, a moving buffer, its average and a teacher: bit for bit after a resume, with a skipped step in it."""
    once, resumed = _state(folder, f"toy-{stage}", 5), _state(folder, f"toy-{stage}-on", 5)
    assert once.keys() == resumed.keys()
    assert all(torch.equal(once[name], resumed[name]) for name in once)
    assert once["model/seen"] == once["ema/seen"] == 8  # a skipped step leaves buffers as they were, too
    average = mean = torch.zeros(3)
    for step in (0, 1, 2, 4):
        for _ in range(2):
            mean = mean.lerp(torch.full((3,), step + 1.0), 0.5)
        average = average.lerp(mean, 0.1)
    torch.testing.assert_close(once["model/mean"], mean)
    torch.testing.assert_close(once["ema/mean"], average)
    assert torch.equal(once["model/frozen"], _state(folder, "toy-single", 2)["model/frozen"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_teacher_is_the_same_on_all_ranks_and_that_of_one_process(results, folder, stage):
    """Saving compares its bits over the ranks. The last step is skipped, and leaves it as it was."""
    assert results[f"sra-{stage}"]["losses"][:3] == pytest.approx(results["sra-single"]["losses"][:3], rel=1e-5)
    assert results[f"sra-{stage}"]["applied"] == [True, True, True, False]
    alone, before, start, found = (
        {name: tensor for name, tensor in _state(folder, f"sra-{kind}", steps).items() if name.startswith("rest/sra.")}
        for kind, steps in (("single", 4), ("before", 3), ("start", 0), (stage, 4))
    )
    assert alone.keys() == before.keys() == start.keys() == found.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, before[name])
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    model = _state(folder, "sra-start", 0)
    assert all(torch.equal(tensor, model[name.replace("rest/sra.", "model/")]) for name, tensor in start.items())
    assert not any(torch.equal(start[name], tensor) for name, tensor in alone.items() if "blocks" in name)


@pytest.mark.parametrize("name", READS)
def test_parameters_that_another_module_reads_are_there_in_stage_3(results, name):
    """MLP, QK-norm and long skips hand them to one op; compiled blocks and recomputed ones need them too."""
    assert results[f"reads-{name}"]["losses"] == pytest.approx(results["reads-single"]["losses"], rel=1e-6)
    assert results[f"reads-{name}"]["norms"] == pytest.approx(results["reads-single"]["norms"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES[:3])
@pytest.mark.parametrize("which", ["selective", "full"])
def test_stages_train_alike_with_recomputed_blocks(results, stage, which):
    """In stage 2 compiled. Stage 3 is in the test above, and refuses "selective"."""
    for value, tolerance in (("losses", 1e-6), ("norms", 1e-5)):
        assert results[f"{which}-{stage}"][value] == pytest.approx(results["reads-single"][value], rel=tolerance)


@pytest.mark.parametrize("name", ["1-to-3", "3-to-2", "3-to-0", "2-ranks-to-one", "3-sharded-to-one"])
def test_states_move_between_stages_and_rank_counts(results, folder, name):
    """Three steps here, three there: the same losses to six digits, the same states at the end."""
    assert results[name]["losses"] == pytest.approx(results["fp32-single"]["losses"][3:], rel=2e-6)
    assert results[name]["optimizer_step"] == 6
    _close(folder, name, "fp32-single", 6, 2e-5)


def test_loading_and_saving_changes_no_bit(results, folder):
    """One process wrote it, two ZeRO-1 ranks loaded it and wrote it again, without a step in between."""
    before, after = _state(folder, "fp32-single", 6), _state(folder, "one-to-1", 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frozen_parameters_stay_and_have_no_moments(results, folder):
    state = _state(folder, "fp32-3", 6)
    assert torch.equal(state["model/pos_embed"], state["ema/pos_embed"])
    assert "optim/exp_avg.pos_embed" not in state
    assert torch.equal(state["model/pos_embed"], _state(folder, "fp32-single", 6)["model/pos_embed"])


def test_overlapped_reduction_is_off_and_never_in_stage_1():
    from dit_fast.runs import EngineConfig, TrainConfig
    from dit_fast.train.zero import deepspeed_config

    assert EngineConfig().overlap_comm is False
    for stage, used in [(0, False), (1, False), (2, True), (3, True)]:
        config = TrainConfig(engine=EngineConfig(zero_stage=stage, overlap_comm=True))
        assert deepspeed_config(config, 2, 4, 1000)["zero_optimization"]["overlap_comm"] is used
