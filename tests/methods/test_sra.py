"""SRA: the loss, its head, and a teacher that follows the model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dit_fast.checkpoint import load_official
from dit_fast.errors import UserError
from dit_fast.methods import build_methods
from dit_fast.methods.sra import SHIFT_STREAM, SRA, alignment, sra_loss
from dit_fast.models.registry import new_model
from dit_fast.nn.projector import SelfProjector
from dit_fast.objectives import Flow, MeanFlow
from dit_fast.ops.draws import Key
from dit_fast.recipes import RECIPES, load
from dit_fast.train.loss import TrainingLoss
from tests.helpers.deterministic_fill import fill
from tests.helpers.golden import assert_close, assert_gradient_norms, golden, golden_names
from tests.helpers.tiny_sit import inputs_for, tiny_sit

FORMS = {"cos": "cosine", "sml1": "smooth_l1"}


NO_FILE = pytest.param("", marks=pytest.mark.skip(reason="DIT_FAST_GOLDEN names no folder with an sra file"))


@pytest.fixture(params=golden_names("sra_") or [NO_FILE])
def reference(request):
    return golden(request.param)


def with_head(seed=0, **changes):
    model = tiny_sit(seed, **changes)
    model.add_head("ap_head", SelfProjector(32))
    return model


def test_distances_are_those_of_the_published_code():
    """methods.md §7.4: the published cosine is that of the values of one channel over the tokens."""
    a, b = fill("golden.a", (2, 4, 8), 4), fill("golden.b", (2, 4, 8), 4).requires_grad_()
    for value, options in ((1.9617774564, ("smooth_l1",)), (1.7902708252, ("cosine", "tokens")), (1.4933477415, ())):
        found = alignment(a, b, *options)
        assert found.item() == pytest.approx(value, abs=1e-9)
        assert not found.requires_grad
    assert alignment(a.bfloat16(), b.bfloat16(), "smooth_l1").dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_of_the_published_code(reference, form):
    meta = reference.meta
    model, teacher = (load_official(reference.group(kind), "sra", meta["num_heads"]) for kind in ("state/", "ema/"))
    x, y, t, noise = (reference.tensor(f"in/{name}") for name in ("x", "y", "t", "noise"))
    depths, shift = (meta["block_out_s"], meta["block_out_t"]), torch.full_like(t, meta["t_max"] * meta["u"])
    found = sra_loss(model, teacher, x, y, t, noise, shift, *depths, FORMS[form], "tokens")
    assert_close(found.flow, reference.tensor("out/denoising"), 2e-5)
    assert_close(found.alignment, reference.tensor(f"out/align_{form}"), 5e-4, 1e-6)
    loss = found.flow.mean() + meta["coeff"] * found.alignment
    assert_close(loss, reference.tensor(f"out/loss_{form}"), 2e-5)
    loss.backward()
    assert_gradient_norms(model, reference.group(f"gradnorm_{form}/"), 2e-4)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_loss_compares_a_block_with_a_later_one_at_less_noise(path):
    """From the equations, in float64; the teacher ends after its block and no gradient reaches it."""
    model, teacher = with_head(), with_head(seed=5, skip_wiring="input").double()
    model.double()
    x, t, y = inputs_for(model, dtype=torch.float64)
    noise, shift = torch.randn_like(x), torch.tensor([0.05, 0.0, 1.0], dtype=torch.float64)

    def at(t):
        t = t.view(-1, 1, 1, 1)
        angle = t * torch.pi / 2
        return (1 - t) * x + t * noise if path == "linear" else angle.cos() * x + angle.sin() * noise

    feature, less = model(at(t), t, y, taps=(1,))[1][1], (t - shift).clamp(0, 1)
    target = teacher(at(less), less, y, taps=(2,))[1][2]
    hidden = F.silu(F.linear(feature, model.ap_head.linear1.weight, model.ap_head.linear1.bias))
    aligned = F.linear(hidden, model.ap_head.linear2.weight, model.ap_head.linear2.bias)
    expected = 1 - F.cosine_similarity(aligned, target, dim=-1).mean()
    teacher.blocks[3].forward = teacher.final_layer.forward = None  # may not run
    found = sra_loss(model, teacher, x, y, t, noise, shift, 2, 3, path=path)
    assert_close(found.alignment, expected, 1e-6)
    assert found.flow.shape == (3,)
    (found.flow.mean() + found.alignment).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.ap_head.linear2.weight.grad.norm() > 0


def test_what_does_not_fit_is_refused():
    model, plain = with_head(), tiny_sit()
    x, t, y = inputs_for(model)
    given = (x, y, t, torch.randn_like(x))
    for call, message in (
        (lambda: sra_loss(plain, model, *given, t / 2, 1, 2), "ap_head"),
        (lambda: sra_loss(model, model, *given, t / 2, 0, 2), "student_depth=0 is not one of this model's blocks 1..4"),
        (lambda: sra_loss(model, model, *given, t / 2, 1, 5), "teacher_depth=5 is not one of"),
        (lambda: sra_loss(model, model, *given, (t / 2)[:, None], 1, 2), r"a shift of shape \[3\], not \[3, 1\]"),
        (lambda: sra_loss(model, model, *given, t[:1] / 2, 1, 2), r"a shift of shape \[3\], not \[1\]"),
        (lambda: alignment(x[0], x[0], "l2"), "unknown distance 'l2'; valid: cosine, smooth_l1"),
        (lambda: alignment(x[0], x[0], axis="token"), "unknown axis 'token'; valid: channels, tokens"),
        (lambda: alignment(x[0], x[0, :, :, :1], "smooth_l1"), "give one shape"),
        (lambda: bound(teacher_depth=5), r"methods\.sra\.teacher_depth=5 is not one of this model's blocks 1\.\.4"),
        (lambda: SRA.Config(student_depth=4, teacher_depth=3), "teacher_depth=3 lies before .*student_depth=4"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def bound(model=None, objective=None, methods=(), **config):
    """(model, SRA, loss) with blocks 2 and 3 aligned."""
    model = model or tiny_sit()
    configs = [*methods, SRA.Config(**{"student_depth": 2, "teacher_depth": 3, **config})]
    built = build_methods(configs, model, SimpleNamespace())
    return model, built[-1], TrainingLoss(model, objective or Flow(Flow.Config(), model), built, seed=3)


def a_batch(model):
    generator = torch.Generator().manual_seed(0)
    moments = torch.rand(3, 2, 3, 8, 8, generator=generator)
    return {"moments": moments, "label": torch.tensor([0, 3, 4]), "position": torch.arange(3) + 7}


def test_the_head_has_the_published_names_and_place():
    model, method, _ = bound()
    names = [name for name, _ in model.named_parameters()]
    head = [f"ap_head.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert names[names.index(head[0]) : names.index("final_layer.linear.weight")] == head
    assert [tuple(model.get_parameter(name).shape) for name in head] == [(64, 32), (64,), (32, 64), (32,)]
    assert 0.9 < method.head.linear1.weight.abs().max() / (6 / 96) ** 0.5 <= 1
    assert method.blocks == {1}


@pytest.mark.parametrize(("wiring", "depth", "kept"), [("off", 3, 0), ("input", 2, 0), ("output", 3, 1)])
def test_the_teacher_is_a_frozen_copy_as_far_as_its_block(wiring, depth, kept):
    model = tiny_sit(skip_wiring=wiring)
    model.add_projector(torch.nn.Linear(32, 8))
    _, method, _ = bound(model, teacher_depth=depth)
    state, own = model.state_dict(), method.teacher.state_dict()
    groups = {".".join(name.split(".")[: 1 + name.startswith(("blocks", "skip"))]) for name in own}
    expected = {"pos_embed", "x_embedder", "t_embedder", "y_embedder", *(f"blocks.{i}" for i in range(depth))}
    assert groups == expected | {f"skip_{part}.{i}" for part in ("linears", "norms") for i in range(kept)}
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    assert {tensor.data_ptr() for tensor in own.values()}.isdisjoint(tensor.data_ptr() for tensor in state.values())
    assert method.tensors().keys() == own.keys() - {"pos_embed"}
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
    x, t, y = inputs_for(model)
    _, found = method.teacher(x, t, y, (depth - 1,), depth - 1)
    assert torch.equal(found[depth - 1], model(x, t, y, (depth - 1,))[1][depth - 1])


def test_the_teacher_moves_by_applied_updates_alone():
    model, method, _ = bound(decay=0.75)
    start = copy.deepcopy(dict(method.tensors()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        for applied in (1.0, 0.0, 1.0, 1.0):
            before = copy.deepcopy(dict(method.tensors()))
            method.after_update(model, torch.tensor(applied))
            if not applied:
                assert all(torch.equal(tensor, before[name]) for name, tensor in method.tensors().items())
    for name, tensor in method.tensors().items():
        kept = 0.75**3
        torch.testing.assert_close(tensor, kept * start[name] + (1 - kept) * model.get_parameter(name).detach())
        assert torch.equal(tensor, method.teacher.state_dict()[name])


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("wiring", ["off", "output"])
def test_a_step_gives_the_term_of_the_plain_function(distance, wiring):
    axis = "tokens" if distance == "cosine" else "channels"
    model, method, loss = bound(tiny_sit(skip_wiring=wiring), distance=distance, axis=axis, t_max=0.6, weight=0.3)
    for tensor in method.tensors().values():
        tensor.mul_(1.1)  # a teacher of its own
    batch, seen = a_batch(model), []
    taken = method.terms
    method.terms = lambda context: seen.append(context) or taken(context)
    total, logs = loss(batch, 0)
    (context,) = seen
    shift = 0.6 * Key(3, batch["position"]).uniform(SHIFT_STREAM, ())
    expected = sra_loss(
        model, method.teacher, context.x, batch["label"], context.t, context.noise, shift, 2, 3, distance, axis
    )
    assert_close(logs["sra/alignment"], expected.alignment, 1e-6)
    assert_close(total, expected.flow.mean() + 0.3 * expected.alignment, 1e-6)


def test_beside_mean_flow_and_its_two_times_a_tree_and_a_tapping_method():
    from dit_fast.methods.diversedit import DiverseDiT

    model = tiny_sit(times=2, skip_wiring="input")
    objective = MeanFlow(MeanFlow.Config(omega=1.0, kappa=0.0), model)
    model, method, loss = bound(model, objective, [DiverseDiT.Config(pairs="all", low=0.0)])
    given, forward = [], method.teacher.forward
    method.teacher.forward = lambda x, t, *rest: given.append(t) or forward(x, t, *rest)
    total, logs = loss(a_batch(model), 0)
    total.backward()
    (times,) = given
    assert times.shape == (3, 2)
    assert (times[:, 1] <= times[:, 0]).all()
    assert {"diversedit/total", "sra/alignment"} <= logs.keys()


def test_the_weight_falls_tenfold_after_its_knee():
    """methods.md §3.4, in steps: 0.2 up to epoch 149, then 2 * 0.1^((epoch - 149) / 1000 + 1)."""
    method = bound(weight=0.2, weight_knee=149 * 5004, weight_decade=1000 * 5004)[1]
    for epoch, expected in ((0, 0.2), (149, 0.2), (649, 2 * 0.1**1.5), (1149, 0.02)):
        assert method.weight(epoch * 5004) == pytest.approx(expected)
    assert bound()[1].weight(10**9) == 0.5


@pytest.mark.parametrize("name", [name for name in RECIPES if "sra" in name.split("-")])
def test_recipes_align_blocks_that_their_models_have(name):
    config = load(name, ["model.input_size=8", "model.in_channels=12", "model.num_classes=10"])
    with torch.device("meta"):
        method = SRA(next(each for each in config.methods if each.name == "sra"), new_model(config.model), None)
    published = {"b2": (3, 8), "l2": (6, 16), "xl2": (8, 20), "dit-xl2": (8, 16)}
    size = name.partition("sra-")[2].rpartition("-")[0]
    assert (method.block + 1, method.last + 1) == published.get(size, (2, 4))
