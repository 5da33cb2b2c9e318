"""Self-Transcendence: the losses, and both stages as one command that is killed, stopped and resumed in either."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.cli import main as command
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.self_transcendence import (
    SelfTranscendence,
    StructureGuidance,
    guided_features,
    masked_mean,
    self_transcendence_loss,
    structure_error,
)
from dit_fast.models import SiT
from dit_fast.nn.projector import projector
from dit_fast.train import loop
from dit_fast.train.__main__ import main
from dit_fast.train.engine import SingleEngine
from tests.helpers.golden import assert_close, assert_gradient_norms, assert_same_state, golden, golden_names
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.tiny_sit import inputs_for, tiny_sit
from tests.helpers.toy_runs import Ranks, arguments, rows, tensors

GOLDEN = golden_names("selftranscendence_")
WORKER = Path(__file__).with_name("staged_worker.py")
SIZES = ("model.depth=4", "model.hidden_size=32", "model.num_heads=2", "model.skip_wiring=off")
KEY = "methods.self_transcendence."
TWO_STAGES = (
    *SIZES, "methods=self_transcendence", f"{KEY}student_depth=2", f"{KEY}teacher_depth=3", f"{KEY}projector_width=8",
    f"{KEY}guidance=3", f"{KEY}t_low=0.2", f"{KEY}t_high=0.9", f"{KEY}stage1_steps=6", f"{KEY}stage1_depth=1",
    f"{KEY}stop_step=5", "run.steps=8", "engine.micro_batch=4",
)  # fmt: skip


def start(shards, run, *overrides):
    return arguments(shards, run, *TWO_STAGES, *overrides)


def student_and_teacher(**changes):
    model, teacher = (tiny_sit(seed, **changes).double() for seed in (0, 9))
    model.add_projector(projector(32, 24, 32).double())
    return model, teacher


@pytest.mark.parametrize("mask", ["per_sample", "published"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_losses_are_those_of_the_equations(mask, path):
    model, teacher = student_and_teacher()
    x, _, y = inputs_for(model, 4, torch.float64)
    noise, t = torch.randn_like(x), torch.tensor([0.1, 0.4, 0.55, 0.7], dtype=torch.float64)
    y[1] = teacher.null_label
    made = self_transcendence_loss(model, teacher, x, y, t, noise, 2, 3, 5.0, (0.4, 0.7), mask=mask, path=path)
    made_gradients = torch.autograd.grad(made.flow.mean() + 0.5 * made.alignment, list(trained(model).values()))

    angle = t.reshape(-1, 1, 1, 1) * torch.pi / 2
    if path == "linear":
        noised, velocity = (1 - t.reshape(-1, 1, 1, 1)) * x + t.reshape(-1, 1, 1, 1) * noise, noise - x
    else:
        noised = angle.cos() * x + angle.sin() * noise
        velocity = torch.pi / 2 * (angle.cos() * noise - angle.sin() * x)
    output, features = model(noised, t, y, taps=(1,))
    with torch.no_grad():
        known = teacher(noised, t, y, taps=(2,))[1][2]
        unknown = teacher(noised, t, torch.full_like(y, 10), taps=(2,))[1][2]
    flow = (output - velocity).square().mean((1, 2, 3))
    guided = (model.projectors[0](features[1]) - (5 * known - 4 * unknown)).square().mean((1, 2))
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    alignment = (guided * inside).sum() / 4
    if mask == "published":  # [N] times [N, 1, 1, 1]
        alignment = (guided * inside.reshape(-1, 1, 1, 1)).mean()
    assert_close(made.flow, flow, 1e-12)
    assert_close(made.guided, guided, 1e-12)
    assert_close(made.alignment, alignment, 1e-12)
    expected = torch.autograd.grad(flow.mean() + 0.5 * alignment, list(trained(model).values()))
    scale = torch.cat([each.flatten() for each in expected]).norm().item()
    for ours, wanted in zip(made_gradients, expected, strict=True):
        assert_close(ours, wanted, 1e-10, 1e-12 * scale)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.skipif(not GOLDEN, reason="DIT_FAST_GOLDEN names no folder with a selftranscendence file")
@pytest.mark.parametrize("name", GOLDEN)
def test_published_numbers(name):
    reference = golden(name)
    meta, (x, y, t, noise) = reference.meta, (reference.tensor(f"in/{part}") for part in ("x", "y", "t", "noise"))
    model, teacher = (
        load_official(reference.group(f"{part}/"), "self_transcendence", num_heads=meta["num_heads"])
        for part in ("state", "teacher")
    )
    assert_same_state(export_official(model), reference.group("state/"))
    depths = (meta["student_depth"], meta["teacher_depth"], meta["feature_guidance"], meta["t_range"])
    for mask, total in (("published", "loss_broadcast_mask"), ("per_sample", "loss_per_sample_mask")):
        made = self_transcendence_loss(model, teacher, x, y, t, noise, *depths, mask=mask)
        loss = made.flow.mean() + meta["coeff"] * made.alignment
        assert_close(made.flow, reference.tensor("out/denoising"), 2e-5)
        assert_close(made.guided, reference.tensor("out/guided_per_sample"), 2e-5)
        assert_close(loss, reference.tensor(f"out/{total}"), 2e-5)
    loss.backward()
    assert_gradient_norms(model, reference.group("gradnorm/"), 2e-4)


def test_the_teacher_runs_once_on_both_labels_and_no_further_than_its_block():
    model, teacher = student_and_teacher()
    x, t, y = inputs_for(model, 3, torch.float64)
    calls, later = [], []
    teacher.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    teacher.blocks[3].register_forward_pre_hook(lambda *_: later.append(1))
    feature = guided_features(teacher, x, t, y, 2, 3.0)
    assert (calls, later, feature.requires_grad) == ([6], [], False)


def test_a_structure_error_is_that_of_the_image_the_tokens_stand_for():
    model = tiny_sit()
    tokens, target = torch.randn(2, 16, 12), torch.randn(2, 3, 8, 8)
    expected = (model._unpatchify(tokens) - target).square().mean((1, 2, 3))
    assert_close(structure_error(tokens, target, model.grid), expected, 1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_files_of_either_stage_are_read_and_given_back(stage):
    """The published names of the heads, which lie in no list."""
    torch.manual_seed(0)
    model = tiny_sit(qk_norm=True)
    if stage == 1:
        StructureGuidance(StructureGuidance.Config(projector_width=24), model, None)
    else:
        method = SelfTranscendence.Config(projector_width=24, student_depth=2, teacher_depth=3)
        SelfTranscendence(method, model, None)
    state = export_official(model, "self_transcendence")
    heads = [name for name in state if name.startswith("projectors")]
    assert heads == [
        *(f"projectors.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        *(["projectors_final.linear.weight", "projectors_final.linear.bias"] if stage == 1 else []),
    ]
    read = load_official(state, "self_transcendence")
    assert_same_state(export_official(read), state)
    x, t, y = inputs_for(model)
    assert torch.equal(read(x, t, y), model(x, t, y))
    assert read.projectors[0](torch.zeros(1, 1, 32)).shape == (1, 1, 32)
    again = SiT(model.config)
    again.add_projector(projector(32, 24, 32))
    again.add_projector(projector(32, 24, 32))
    with pytest.raises(UserError, match=r"'projectors\.1': the published code has one head"):
        export_official(again, "self_transcendence")
    if stage == 1:
        with pytest.raises(UserError, match="use family='self_transcendence'"):
            load_official({f"{k.replace('projectors.', 'projectors.0.')}": v for k, v in state.items()}, "repa")


def test_a_mask_of_another_name_is_refused():
    with pytest.raises(UserError, match="unknown mask 'both'; valid: per_sample, published"):
        masked_mean(torch.ones(2), torch.ones(2), (0, 1), "both")
    with pytest.raises(ConfigError, match="needs a model with a head"):
        self_transcendence_loss(tiny_sit(), tiny_sit(), *[None] * 4, 1, 1, 1.0, (0, 1))


def test_depths_count_from_one_and_a_range_runs_forwards():
    model, teacher = student_and_teacher()
    for depths, message in (((0, 1), "student_depth=0 is not one"), ((1, 9), "teacher_depth=9 is not one")):
        with pytest.raises(ConfigError, match=message):
            self_transcendence_loss(model, teacher, *[None] * 4, *depths, 1.0, (0, 1))
    for backwards in ((0.7, 0.4), (0.4, 0.5, 0.7)):
        with pytest.raises(UserError, match=rf"t_range=\({str(backwards)[1:-1]}\) must be \(smallest, largest\)"):
            masked_mean(torch.ones(2), torch.ones(2), backwards, "per_sample")
    with pytest.raises(UserError, match="guidance=nan must be a finite number"):
        self_transcendence_loss(model, teacher, *[None] * 4, 1, 1, float("nan"), (0, 1))


# Whole runs


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """Both stages without an interruption."""
    run = tmp_path_factory.mktemp("finished") / "RUN"
    assert main(start(shards, run)) == 0
    return run


def same_runs(first, second):
    for stage, step in (("stage1", 6), ("stage2", 8)):
        assert rows(first / stage) == rows(second / stage)
        ours, theirs = tensors(first / stage, step), tensors(second / stage, step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return True


def digest_of(run, step):
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json").read_text())["files"][
        "model.safetensors"
    ]["sha256"]


def state_of(run, step):
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())


def test_two_ordinary_runs_are_left(finished, capsys):
    assert sorted(path.name for path in finished.iterdir()) == ["stage1", "stage2"]
    first, second = rows(finished / "stage1"), rows(finished / "stage2")
    assert all("structure_guidance/structure" in row for row in first)
    taught = ["self_transcendence/alignment" in row for row in second]
    assert taught == [True] * 5 + [False] * 3
    assert state_of(finished / "stage2", 8)["digests"] == {
        "self_transcendence.teacher": digest_of(finished / "stage1", 6)
    }
    stored = state_of(finished / "stage2", 8)["config"]["methods"]["self_transcendence"]
    assert stored["teacher"] == str(finished / "stage1")
    drawn = str(finished.parent / "images.npz")
    options = ["--per-class", "1", "--num-steps", "2", "--cfg-scale", "1"]
    assert command(["sample", str(finished / "stage2"), "--out", drawn, *options]) == 0
    for word in ("sample", "report"):
        assert command([word, str(finished), "--out", str(finished.parent / f"{word}.npz")]) == 2
        places = f"{finished / 'stage1'}, {finished / 'stage2'}"
        assert f"{finished}: is no run itself; name one of those in it: {places}" in capsys.readouterr().err


@pytest.mark.parametrize("after", [5, 6, 12])
def test_a_kill_in_either_stage_changes_no_bit(after, finished, shards, tmp_path, monkeypatch):
    """Killed in the first stage, right after it, in the second; each stage saves every fourth step."""
    done = []

    def step(self, *arguments, run=SingleEngine.train_step):
        if len(done) == after:
            raise RuntimeError("killed")
        done.append(1)
        return run(self, *arguments)

    run = tmp_path / "RUN"
    with monkeypatch.context() as patch:
        patch.setattr(SingleEngine, "train_step", step)
        assert main(start(shards, run)) == 1
    assert (run / "stage2" / "checkpoints").exists() == (after > 5)
    built = []

    def counted(*arguments, make=loop.new_model):
        built.append(1)
        return make(*arguments)

    monkeypatch.setattr(loop, "new_model", counted)
    assert main(start(shards, run)) == 0
    assert len(built) == (1 if after > 5 else 2)  # a finished stage is not built again
    assert same_runs(run, finished)


@pytest.mark.parametrize(("at", "folder"), [(3, "RUN"), (6, "RUN"), (6, "RUN/stage1")])
def test_a_stop_request_in_the_first_stage_ends_the_command(at, folder, finished, shards, tmp_path, monkeypatch):
    """By the file of the command or of the stage; in the last step, too: the second then begins with the next start."""
    done = []

    def step(self, *arguments, run=SingleEngine.train_step):
        done.append(1)
        if len(done) == at:
            (tmp_path / folder / "STOP").touch()
        return run(self, *arguments)

    run = tmp_path / "RUN"
    with monkeypatch.context() as patch:
        patch.setattr(SingleEngine, "train_step", step)
        assert main(start(shards, run)) == 0
    assert sorted(path.name for path in run.iterdir()) == ["stage1"]
    assert not (run / "stage1" / "STOP").exists()
    assert main(start(shards, run)) == 0
    assert same_runs(run, finished)


def test_a_teacher_that_is_given_trains_the_second_stage_alone(finished, shards, tmp_path, capsys):
    """Its path may change from start to start, its weights may not."""
    moved, run = shutil.copytree(finished / "stage1", tmp_path / "moved"), tmp_path / "run"
    assert main(start(shards, run, f"{KEY}teacher={finished / 'stage1'}", "run.steps=4")) == 0
    step = moved / "checkpoints" / "step_00000006"
    assert main(start(shards, run, f"{KEY}teacher={step}")) == 0
    ours, theirs = tensors(run, 8), tensors(finished / "stage2", 8)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    capsys.readouterr()
    older = step.with_name("step_00000004")
    assert main(start(shards, run, f"{KEY}teacher={older}", "run.steps=9")) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for digest in (digest_of(moved, 4), digest_of(moved, 6)):
        assert digest[:12] in error
    assert main(start(shards, run, f"{KEY}teacher={tmp_path / 'nowhere'}")) == 2
    assert f"{tmp_path / 'nowhere' / 'checkpoints'}: holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{KEY}student_depth=5", f"{KEY}student_depth=5 is not one of this model's blocks 1..4"),
        (f"{KEY}teacher_depth=5", f"{KEY}teacher_depth=5 is not one of this model's blocks 1..4"),
        (f"{KEY}stage1_depth=5", "methods.structure_guidance.depth=5 is not one of this model's blocks 1..4"),
        (f"{KEY}t_low=0.95", f"{KEY}t_low=0.95 lies above t_high=0.9"),
        ("model.label_dropout=0", "no trained null label, which guided features need"),
        ("model.class_token=6", "the model denoises 'class_token' beside the image"),
    ],
)
def test_what_does_not_fit_either_stage_is_refused_before_the_first(override, message, shards, tmp_path, capsys):
    assert main(start(shards, tmp_path / "RUN", override)) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "RUN").glob("*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_size=64"], "its width are 32, this model's 64"),
        (["objective.path=cosine"], "was trained with objective=flow objective.path=linear, this run with"),
        (["model.times=2", "objective=mean_flow"], "was trained with objective=flow"),
        (["model.num_classes=7"], "its classes are 3, this model's 7"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(overrides, message, finished, shards, tmp_path, capsys):
    given = f"{KEY}teacher={finished / 'stage1'}"
    assert main(start(shards, tmp_path / "run", given, *overrides)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [start("", "RUN", f"{KEY}teacher=elsewhere"), arguments("", "RUN")])
def test_the_folder_of_two_stages_is_not_taken_for_one_run(command, finished, shards, capsys):
    assert main([*command, f"data.path={shards}", f"run.dir={finished}"]) == 2
    assert f"is no run itself; name one of those in it: {finished / 'stage1'}" in capsys.readouterr().err


def test_two_stages_do_not_go_into_the_folder_of_another_run(finished, shards, capsys):
    assert main(start(shards, finished / "stage2")) == 2
    assert "stage2: holds a run; stages of another may not lie in it" in capsys.readouterr().err


def test_both_stages_go_beside_reg_in_bf16_with_the_papers_target(token_shards, tmp_path):
    short = [f"{KEY}stage1_steps=1", "run.steps=1", "engine.precision=bf16", f"{KEY}stage1_target=latent"]
    reg = ["methods=reg,self_transcendence", "methods.reg.encoder_depth=2", "model.class_token=6"]
    assert main(start(token_shards, tmp_path / "RUN", *short, *reg)) == 0
    assert rows(tmp_path / "RUN" / "stage2")[-1]["self_transcendence/unmasked"] > 0


@pytest.mark.launch
def test_two_ranks_in_zero_3_train_both_stages_as_one_process_does(shards, tmp_path):
    """An epsilon that lets wrong gradients show; every parameter is cut; the first stage's model is freed."""
    changes = ["optimizer.eps=1e-2", "engine.micro_batch=2", f"{KEY}stop_step=3", "run.steps=6"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(start(shards, alone, *changes)) == 0
    command = start(shards, shared, *changes, "engine.zero_stage=3")
    with Ranks(command, tmp_path / "log", program=(str(WORKER),)) as ranks:
        assert ranks.wait() == [0, 0], ranks.text()
    assert ranks.text().count("0 of 1 earlier models alive") == 2
    for stage in ("stage1", "stage2"):
        ours, theirs = tensors(shared / stage, 6), tensors(alone / stage, 6)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert_close(ours[name], tensor, 1e-6 if "optim" not in name else 1e-4, 1e-9)
