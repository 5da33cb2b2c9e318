"""HASTE: its two losses, and as a method."""

from types import SimpleNamespace

import pytest
import torch

from dit_fast.data.field import Field
from dit_fast.encoders import load_encoder
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods import build_methods, haste
from dit_fast.methods.repa import repa_loss
from dit_fast.models import build_model
from dit_fast.nn.attention import Heads
from dit_fast.objectives import Flow
from dit_fast.train.__main__ import main
from dit_fast.train.loss import TrainingLoss
from tests.helpers.cases import loop_over
from tests.helpers.encoder_weights import toy_encoder
from tests.helpers.golden import assert_close, golden, golden_names
from tests.helpers.parts import settings
from tests.helpers.toy_runs import arguments, rows

GOLDEN = golden_names("haste_")


def test_golden_files_are_there():
    assert GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_published_attention_and_feature_losses(name):
    case = golden(name)
    given = {side: [case.tensor(f"in/{side}_{part}") for part in "qk"] for side in ("student", "teacher")}
    query, prediction = given["student"][0].requires_grad_(), case.tensor("in/prediction").requires_grad_()
    logits = {side: [case.meta["scale"] * q @ k.mT for q, k in zip(*each, strict=True)] for side, each in given.items()}
    attention = haste.attention_loss(logits["student"], logits["teacher"], heads=case.meta["heads_used"])
    projection = repa_loss(prediction, case.tensor("in/z"))
    assert_close(attention, case.tensor("out/attention"), 2e-5)
    assert_close(projection, case.tensor("out/projection"), 2e-5)
    (case.meta["attn_coeff"] * attention + case.meta["proj_coeff"] * projection).backward()
    assert_close(query.grad, case.tensor("grad/student_q"), 2e-4)
    assert_close(prediction.grad, case.tensor("grad/prediction"), 2e-4)
    stop = case.meta["stop_step"]
    assert [haste.active(step, stop) for step in (0, stop - 1, stop, stop + 1)] == [True, True, False, False]


def heads(count, seed, layers=2, tokens=5, width=4):
    generator = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(2, count, tokens, width, generator=generator, dtype=torch.float64)  # noqa: E731
    return [Heads(make(), make()) for _ in range(layers)]


def test_layer_by_layer_from_queries_and_keys_it_is_the_same_loss_and_gradient():
    student, teacher = heads(3, 0), heads(2, 1)
    leaves = [leaf.requires_grad_() for layer in student for leaf in layer]
    whole = haste.attention_loss([q @ k.mT / 2 for q, k in student], [q @ k.mT / 2 for q, k in teacher])
    parts = haste.heads_loss(student, teacher)
    assert_close(parts, whole, 1e-14)
    for ours, theirs in zip(torch.autograd.grad(parts, leaves), torch.autograd.grad(whole, leaves), strict=True):
        assert_close(ours, theirs, 1e-12)


def test_no_more_than_one_layers_logits_is_kept_for_the_backward_pass():
    student, teacher = heads(2, 0, tokens=64), heads(2, 1, tokens=64)
    kept = []
    for layer in student:
        layer.query.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        haste.heads_loss(student, teacher)
    assert max(kept, default=0) < 2 * 2 * 64 * 64


@loop_over(
    ("student", "teacher", "heads", "message"),
    [
        ((3, 5), (3, 5), 4, "heads=4: the student has 3 heads and the teacher 3; at most 3"),
        ((3, 5), (2, 5), 3, "at most 2 can be compared"),
        ((3, 5), (3, 5), 0, "heads=0"),
        ((3, 5), (3, 6), None, r"alike but for H, not \[2, 3, 5, 5\]"),
    ],
)
def test_logits_that_cannot_be_compared(student, teacher, heads, message):
    ours, theirs = (torch.zeros(2, count, tokens, tokens) for count, tokens in (student, teacher))
    with pytest.raises(UserError, match=message):
        haste.attention_loss([ours], [theirs], heads=heads)


@loop_over("count", [None, 2, 1])
def test_the_first_heads_of_either_side_are_compared(count):
    student, teacher = (torch.stack([q @ k.mT for q, k in heads(size, size, layers=1)])[0] for size in (2, 3))
    used = count or 2
    wanted = -(teacher[:, :used].softmax(-1) * student[:, :used].softmax(-1).log()).sum(-1).mean()
    assert_close(haste.attention_loss([student], [teacher], count), wanted, 1e-12)


def test_layers_are_paired():
    with pytest.raises(UserError, match="at least one: not 0 with 0"):
        haste.attention_loss([], [])
    with pytest.raises(UserError, match="not 1 with 2"):
        haste.attention_loss([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)] * 2)
    with pytest.raises(UserError, match=r"must be \[B, H, Q, K\]"):
        haste.attention_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


SIZES = {"input_size": 4, "in_channels": 12, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 3}
SETTINGS = {"encoder_depth": 2, "projector_width": 8, "student_depths": (1, 3), "teacher_depths": (2, 1)}
INFO = SimpleNamespace(field=lambda name: Field("image.npy", (3, 16, 16), "uint8"))


def bound(**changes):
    torch.manual_seed(0)
    own = {key: changes.pop(key) for key in ("input_width", "num_heads", "class_token") if key in changes}
    model = build_model("SiT-Nano/2", **{**SIZES, **own})
    settings = {**SETTINGS, "encoders": (f"dinov2-vit-b:{toy_encoder()}",), **changes}
    return model, *build_methods([haste.HASTE.Config(**settings)], model, INFO)


def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "moments": torch.rand(3, 2, 12, 4, 4, generator=generator),
        "label": torch.tensor([0, 1, 2]),
        "position": torch.arange(3),
        "image": torch.randint(0, 256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8),
    }


def test_its_terms_are_the_plain_losses_of_the_encoders_maps_without_class_token():
    model, method = bound(attention_heads=1)
    seen = []
    training = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0)
    terms = method.terms
    method.terms = lambda context: seen.append(context) or terms(context)
    value, logs = training(batch(), 0)
    (context,) = seen
    encoder = load_encoder(f"dinov2-vit-b:{toy_encoder()}")
    images = batch()["image"].float() / 127.5 - 1
    maps = [(q[:, :, 1:] @ k[:, :, 1:].mT) / 8 for q, k in encoder.attention(images, 2, [1, 0])]  # heads of 64
    own = [context.taps.heads[block] for block in (0, 2)]
    expected = haste.attention_loss([q @ k.mT / 4 for q, k in own], maps, heads=1)  # heads of 16
    assert_close(logs["haste/attention"], expected, 1e-5)
    projected = method.heads[0](context.features[1])
    assert_close(logs["haste/alignment"], repa_loss(projected, encoder(images, 2)["features"]), 1e-5)
    assert_close(value, logs["flow"] + 0.5 * logs["haste/attention"] + 0.5 * logs["haste/alignment"], 1e-6)


def test_after_its_stop_the_encoder_is_gone_and_no_head_is_handed_out():
    model, method = bound(stop_step=4)
    assert haste.HASTE.Config().stop_step == 250_000
    run = TrainingLoss(model, Flow(Flow.Config(), model), [method], seed=0)
    assert run(batch(), 3)[1].keys() == {"loss", "flow", "haste/alignment", "haste/attention"}
    assert run(batch(), 4)[1].keys() == {"loss", "flow"}
    assert method.targets.encoders == []


@loop_over(
    ("changes", "message"),
    [
        ({"encoders": ()}, "methods.haste.encoders lists 0; give one vision transformer"),
        ({"student_depths": (1,)}, "student_depths lists 1 blocks and teacher_depths 2"),
        ({"student_depths": (1, 4)}, "methods.haste.student_depths=4 is not one of this model's blocks 1..3"),
        ({"teacher_depths": (1, 3)}, r"teacher_depths=3 is not one of the blocks 1..2 of dinov2-vit-b"),
        ({"attention_heads": 3}, "the model has 2 heads and dinov2-vit-b 2; set at most 2, or 0"),
        ({"input_width": 6}, "the model has 2 x 3 tokens, an encoder gives a square"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        bound(**changes)


def test_an_encoder_without_attention_is_refused(monkeypatch):
    simple = SimpleNamespace(identity="a:b", shapes=lambda grid: {"features": (4, 6)})
    simple.to = lambda device: simple
    monkeypatch.setattr("dit_fast.methods.targets.load_encoder", lambda spec: simple)
    with pytest.raises(ConfigError, match=r"methods\.haste\.encoders=simple has no attention"):
        bound(encoders=("simple",))


def test_beside_a_class_token_the_patch_tokens_are_compared(token_shards, tmp_path):
    """REG's token is in front of the model's tokens; in bf16, over the stop."""
    stop = ["methods.haste.stop_step=1", "engine.precision=bf16", "engine.micro_batch=4"]
    assert main(arguments(token_shards, tmp_path / "run", *settings(("reg", "haste"), 2), *stop)) == 0
    first, second = rows(tmp_path / "run")
    assert {"haste/attention", "reg/alignment"} <= first.keys()
    assert "haste/attention" not in second


def test_the_quick_start_trains_with_the_weights_it_is_given(token_shards, tmp_path):
    spec = f"methods.haste.encoders=dinov2-vit-b:{toy_encoder()}"
    own = [spec, "methods.haste.teacher_depths=1,2", "run.steps=1", "engine.global_batch=4", "preview.every=0"]
    places = [f"data.path={token_shards}", f"run.dir={tmp_path / 'run'}", "run.log_every=1"]
    assert main(["quickstart-diversedit-haste", *own, *places]) == 0
    assert {"haste/attention", "haste/alignment", "diversedit/total"} <= rows(tmp_path / "run")[0].keys()
