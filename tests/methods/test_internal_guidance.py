"""Internal guidance: the second head's loss, checkpoints, samples that lead away from it, and the method."""

from types import SimpleNamespace

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.checkpoint.official import save_official
from dit_fast.checkpoint.run import load_run
from dit_fast.diffusion import Guidance, sample
from dit_fast.errors import UserError
from dit_fast.methods import build_methods
from dit_fast.methods.internal_guidance import InternalGuidance, internal_guidance_losses
from dit_fast.methods.reg import REG
from dit_fast.models import new_model
from dit_fast.objectives import DDPM, Flow
from dit_fast.recipes import RECIPES, load
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples
from dit_fast.train.__main__ import main
from dit_fast.train.loss import TrainingLoss
from dit_fast.tree import image
from dit_fast.world import here
from tests.helpers.cases import loop_over, refused
from tests.helpers.golden import assert_close, assert_gradient_norms, assert_same_state, golden, golden_names
from tests.helpers.parts import settings
from tests.helpers.tiny_sit import inputs_for, tiny_sit
from tests.helpers.toy_runs import arguments, rows

NAMES = golden_names("internalguidance_")
OPTIONS = {"sg_scale": "ig_scale", "sg_guidance_low": "ig_low", "sg_guidance_high": "ig_high"}


@pytest.fixture(params=NAMES)
def reference(request):
    return golden(request.param)


def loaded(reference):
    meta = reference.meta
    state = reference.group("state/")
    return load_official(state, "internal_guidance", num_heads=meta["num_heads"], encoder_depth=meta["encoder_depth"])


def test_losses_and_gradients_of_the_published_code(reference):
    model, meta = loaded(reference), reference.meta
    x, y, t, noise = (reference.tensor(f"in/{name}") for name in ("x", "y", "t", "noise"))
    v, auxiliary = model(reference.tensor("in/x_t"), t, y)
    assert_close(v, reference.tensor("out/v"), 1e-5)
    assert_close(auxiliary, reference.tensor("out/v_auxiliary"), 1e-5)
    found = internal_guidance_losses(model, x, y, t, noise, path=meta["path_type"])
    assert_close(found.flow, reference.tensor("out/denoising"), 1e-5)
    assert_close(found.auxiliary, reference.tensor("out/auxiliary"), 1e-5)
    loss = found.flow.mean() + meta["auxiliary_coeff"] * found.auxiliary.mean()
    assert_close(loss, reference.tensor("out/loss"), 1e-5)
    loss.backward()
    assert_gradient_norms(model, reference.group("gradnorm/"), 1e-5)
    for name, gradient in reference.group("grad/").items():
        assert_close(model.get_parameter(name).grad, gradient, 1e-5)


def test_samples_of_the_published_code(reference):
    model, meta = loaded(reference), reference.meta
    start, y = reference.tensor("in/start"), reference.tensor("in/y")
    for call, given in meta["calls"].items():
        options = {OPTIONS.get(name, name): value for name, value in given.items()}
        generator = torch.Generator().manual_seed(meta["noise_seed"])
        ours = sample(model, start, y, "sde", generator=generator, path=meta["path_type"], **options)
        assert_close(ours, reference.tensor(f"out64/{call}"), 1e-5)


def test_a_checkpoint_goes_out_as_it_came_in(reference, tmp_path):
    model, state = loaded(reference), reference.group("state/")
    assert model.outputs == 2
    assert_same_state(export_official(model), state)
    save_official(model, tmp_path / "model.safetensors")
    again = load_official(tmp_path / "model.safetensors", "internal_guidance")
    assert again.config.auxiliary_depth == reference.meta["encoder_depth"]
    heads = reference.meta["num_heads"]
    told = refused(load_official, state, "internal_guidance", heads)
    assert f"pass encoder_depth, from 1 to {reference.meta['depth']}" in told
    told = refused(load_official, state, "internal_guidance", heads, encoder_depth=9)
    assert "auxiliary_depth=9 is not one of the blocks" in told
    assert "use family='internal_guidance'" in refused(load_official, state, "repa", heads)
    assert "a model with auxiliary_depth" in refused(export_official, tiny_sit(), "internal_guidance")


def two(x, t, y):
    """A plain function of two outputs."""
    return x * t[:, None, None, None] + y[:, None, None, None], x * 0.5 - y[:, None, None, None]


@loop_over("sampler", ["euler", "heun", "sde", "rk4", "dopri5"])
@loop_over("scale", [-0.5, 0.0, 0.6, 1.0, 1.7])
@loop_over("cfg_scale", [1.0, 1.5])
def test_every_scale_is_an_extrapolation_within_its_times_for_both_labels(sampler, scale, cfg_scale):
    low, high = 0.3, 0.8

    def one(x, t, y):
        """What the formula makes of both outputs, in each evaluation for itself."""
        v, auxiliary = two(x, t, y)
        inside = ((t >= low) & (t <= high)).double()[:, None, None, None]
        return v + inside * (scale - 1) * (v - auxiliary)

    noise, y = torch.ones(2, 1, 2, 2, dtype=torch.float64), torch.tensor([1, 2])
    given = {"num_steps": 7, "cfg_scale": cfg_scale, "null_label": 3, "heun_guidance": "each", "guidance_high": 0.6}
    if sampler == "sde":
        given["draws"] = torch.ones(6, 2, 1, 2, 2, dtype=torch.float64)
    if sampler == "dopri5":
        given |= {"atol": 1e-9, "rtol": 1e-9}
    ours = sample(two, noise, y, sampler, ig_scale=scale, ig_low=low, ig_high=high, **given)
    assert_close(ours, sample(one, noise, y, sampler, **given), 1e-5 if sampler == "dopri5" else 1e-12)


def test_bounds_are_included_and_the_first_evaluation_of_a_step_decides():
    noise, y, given = torch.ones(1, 1, 2, 2), torch.tensor([1]), {"times": [0.8, 0.5, 0.25]}
    plain, both, first, second, none = (
        sample(two, noise, y, ig_scale=2.0, ig_low=low, ig_high=high, **given)
        for low, high in ((0.9, 1.0), (0.5, 0.8), (0.6, 0.8), (0.5, 0.6), (0.51, 0.79))
    )
    assert torch.equal(plain, sample(two, noise, y, **given))
    assert torch.equal(none, plain)
    assert len({other.sum().item() for other in (plain, both, first, second)}) == 4
    once = {"sampler": "heun2", "times": [0.5, 0.4], "ig_scale": 2.0, "ig_low": 0.45}
    assert torch.equal(
        sample(two, noise, y, **once), sample(two, noise, y, **once | {"ig_low": 0.0})
    )  # as the noisier end is guided
    assert not torch.equal(sample(two, noise, y, **once, heun_guidance="each"), sample(two, noise, y, **once))


def test_the_noise_of_ddpm_is_extrapolated_and_its_variance_is_left():
    model = tiny_sit(name="DiT-S/2", auxiliary_depth=1)
    x, t, y = inputs_for(model)
    field = DDPM(DDPM.Config(), model).field(model, y, Guidance(ig_scale=3.0))
    (first, second), value = model(x, torch.full_like(t, 400), y), field(x.double(), 400, 399)
    eps, logits = first.chunk(2, 1)
    assert_close(value, torch.cat((second + 3 * (eps - second), logits), 1), 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ig_scale": float("nan")}, "ig_scale=nan must be a finite number"),
        ({"ig_scale": "2"}, "ig_scale='2' must be"),
        ({"ig_low": 1.2}, r"ig_low=1.2 must be a time in \[0, 1\]"),
        ({"ig_low": 0.5, "ig_high": 0.4}, "ig_low=0.5 lies above ig_high=0.4; swap them"),
        ({"model": lambda x, t, y: x, "ig_scale": 2.0}, "ig_scale=2.0 needs a second output"),
        ({"model": tiny_sit(), "ig_scale": 2.0}, "this SiT has none; train it with methods=internal_guidance"),
        ({"model": tiny_sit(auxiliary_depth=1, times=2), "sampler": "mean_flow", "ig_scale": 0.5}, "this SiT has none"),
        ({"model": lambda x, t, y: (x, x[:1])}, "the model returned a tuple"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    noise = torch.ones(2, 3, 8, 8)
    with pytest.raises(UserError, match=message):
        sample(**{"model": two, "noise": noise, "y": torch.tensor([1, 2]), "num_steps": 1, **options})
    assert "returns two velocities" in refused(
        internal_guidance_losses, tiny_sit(), noise, torch.tensor([1, 2]), torch.ones(2), noise
    )


def bound(model, objective=None, **config):
    methods = build_methods([InternalGuidance.Config(**config)], model, None)
    return TrainingLoss(model, objective or Flow(Flow.Config(), model), methods, seed=3), methods[0]


def a_batch(model, count=3, **fields):
    channels, height, width = model.shapes["image"]
    generator = torch.Generator().manual_seed(0)
    return {
        "moments": torch.randn(count, 2, channels, height, width, generator=generator).abs(),
        "label": torch.arange(count) % 2,
        "position": torch.arange(count),
        **fields,
    }


@pytest.mark.parametrize("prediction", ["velocity", "x"])
def test_a_step_gives_the_term_of_the_plain_function(prediction):
    model = tiny_sit(auxiliary_depth=2)
    weighting = "none" if prediction == "velocity" else "velocity"
    objective = Flow(Flow.Config(prediction=prediction, weighting=weighting), model)
    loss, method = bound(model, objective, weight=0.3)
    seen, terms = [], method.terms
    method.terms = lambda context: seen.append(context) or terms(context)
    total, logs = loss(a_batch(model), 0)
    (context,) = seen
    target = context.target if prediction == "velocity" else (context.noised - context.x)
    span = 1 if prediction == "velocity" else context.t.clamp(min=0.05)
    auxiliary = context.second if prediction == "velocity" else context.noised - context.second
    expected = ((auxiliary - target).square().flatten(1).mean(1) / (span * span)).mean()
    assert_close(logs["internal_guidance/auxiliary"], expected, 1e-5)
    assert_close(total, logs["flow"] + 0.3 * expected, 1e-5)
    total.backward()
    assert model.final_layer_xr.linear.weight.grad.norm() > 0


def test_a_class_token_beside_the_image_counts_by_its_weight():
    model = tiny_sit(auxiliary_depth=2, class_token=6)
    data = SimpleNamespace(field=lambda name: SimpleNamespace(shape={"features": (16, 6), "class_token": (6,)}[name]))
    values = {}
    for weight in (0.0, 1.0):
        configs = [
            REG.Config(encoder_depth=1, projector_width=8),
            InternalGuidance.Config(class_token_weight=weight),
        ]
        methods = build_methods(configs, tiny := tiny_sit(auxiliary_depth=2, class_token=6), data)
        loss = TrainingLoss(tiny, Flow(Flow.Config(), tiny), methods, seed=3)
        fields = {"features": torch.ones(3, 16, 6), "class_token": torch.ones(3, 6)}
        total, logs = loss(a_batch(model, **fields), 0)
        total.backward()
        assert image(tiny(*inputs_for(tiny))[1]).shape == (3, 3, 8, 8)
        values[weight] = logs["internal_guidance/auxiliary"]
        assert (tiny.final_layer_xr.linear_cls.weight.grad.norm() > 0) == bool(weight)
    assert values[1.0] > values[0.0] > 0


def test_a_run_trains_and_is_sampled_with_it(shards, tmp_path):
    run = tmp_path / "run"
    assert main(arguments(shards, run, *settings(("internal_guidance",), 3), "optimizer.lr=0.01")) == 0
    assert rows(run)[-1].keys() >= {"flow", "internal_guidance/auxiliary"}
    loaded, drawn = load_run(run), {}
    for scale, low in ((1.0, 0.0), (40.0, 0.0), (40.0, 0.5)):
        options = SampleOptions(per_class=1, num_steps=3, ig_scale=scale, ig_low=low)
        drawn[scale, low] = Samples.join(sample_images(loaded, options, here()))
    plain, guided, partly = drawn.values()
    assert plain.text == "heun, 3 steps, guidance 2.5, seed 0"
    assert guided.text == "heun, 3 steps, guidance 2.5, internal guidance 40, seed 0"
    assert partly.text == "heun, 3 steps, guidance 2.5, internal guidance 40 for t in [0.5, 1], seed 0"
    assert not (plain.images == guided.images).all()
    assert not (partly.images == guided.images).all()


def test_a_run_that_cannot_have_it_is_refused():
    config = [InternalGuidance.Config()]
    assert "set model.auxiliary_depth to one of the blocks 1..4" in refused(build_methods, config, tiny_sit(), None)
    two_times = tiny_sit(auxiliary_depth=2, times=2)
    assert "has its guidance in its target already" in refused(build_methods, config, two_times, None)
    assert "model.auxiliary_depth=2 adds a head that no method" in refused(
        build_methods, [], tiny_sit(auxiliary_depth=2), None
    )


@loop_over("name", [name for name in RECIPES if "internal_guidance" in name])
def test_recipes_have_the_head_of_their_method(name):
    config = load(name, ["model.input_size=8", "model.in_channels=4", "model.num_classes=10"])
    chosen = [each for each in config.methods if each.name == "internal_guidance"]
    with torch.device("meta"):
        build_methods(chosen, new_model(config.model), None)
    assert config.model.auxiliary_depth == (8 if "xl2" in name else 2)


@pytest.mark.parametrize("name", ["LightningDiT-Nano/2", "JiT-Nano/2"])
def test_networks_built_of_the_same_parts_have_the_head_too(name):
    model = tiny_sit(name=name, auxiliary_depth=3, skip_wiring="output")
    x, t, y = inputs_for(model)
    _, second = model(x, t, y)
    head, seen = model.final_layer_xr, []
    head.register_forward_hook(lambda module, given, result: seen.append(given[0]))
    _, features = model(x, t, y, taps=[2])
    assert torch.equal(seen[0], features[2])  # without tokens of the network's own
    assert second.shape == x.shape
    assert type(head) is type(model.final_layer)
    assert head.norm == model.final_layer.norm


def test_a_network_without_such_a_head_is_named():
    model = tiny_sit(name="DDT-Nano/2", encoder_depth=2)
    assert "which DDT-Nano/2 cannot have" in refused(build_methods, [InternalGuidance.Config()], model, None)
