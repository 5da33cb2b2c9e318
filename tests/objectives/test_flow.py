"""Flow matching as an objective: trees, noise that is made where it is used, and the field that samplers follow."""

import pytest
import torch
from torch import nn

from dit_fast.diffusion import Guidance, Path, sample
from dit_fast.models import Taps
from dit_fast.objectives import OBJECTIVES, Flow, flow
from dit_fast.ops.draws import Key
from dit_fast.philox import Stream
from dit_fast.tree import each, image, leaves

KEY = Key(2**63 + 5, torch.arange(4) + 2**33)
Y = torch.arange(4)


class Scale(nn.Module):
    """v = weight x + t on every leaf; label 7 stands for none and halves it."""

    null_label, times, learns_variance, shapes = 7, 1, False, {"image": (3, 8, 8)}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 1, 8))

    def forward(self, x, t, y, taps=()):
        share = torch.where(y == 7, 0.5, 1.0)
        return each(
            lambda leaf: (share * t).view(-1, *[1] * (leaf.dim() - 1)) + self.weight[: leaf.shape[-1]] * leaf, x
        )


def clean(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 8, 8, generator=generator)
    return x if form == "image" else {"image": x, "class_token": torch.rand(4, 6, generator=generator)}


def run(form="image", path="linear"):
    model = Scale()
    return Flow(Flow.Config(path=path), model).run(model, clean(form), Y, KEY, Taps(), {}, 3)


@pytest.mark.parametrize("form", ["image", "tree"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_without_stored_noise_it_is_the_same_to_the_bit(form, path, monkeypatch):
    """The branch of the fused ops, taken on the CPU, where they are the reference."""
    results, drawn, normal = [], [], Key.normal
    monkeypatch.setattr(Key, "normal", lambda key, stream, shape: drawn.append(stream) or normal(key, stream, shape))
    for fused in (False, True):
        monkeypatch.setattr(flow, "draws_noise_in_registers", lambda latents, fused=fused: fused)
        drawn.clear()
        context = run(form, path)
        assert (Stream.NOISE in drawn) is not fused
        assert (Stream.CLASS_TOKEN in drawn) is (form == "tree")
        sum(loss.sum() for loss in context.losses.values()).backward()
        trees = (context.noised, context.noise, context.target, context.noised_at(context.t / 2), context.losses)
        found = [leaf for tree in trees for leaf in leaves(tree).values()]
        results.append([*found, context.t, context.model.weight.grad])
    assert all(torch.equal(plain, ours) for plain, ours in zip(*results, strict=True))


def test_the_losses_of_a_tree_are_those_of_its_leaves():
    context, alone = run("tree", "cosine"), run("image", "cosine")
    for name in ("noised", "noise", "target", "prediction"):
        assert torch.equal(image(getattr(context, name)), getattr(alone, name))
    assert torch.equal(context.losses["image"], alone.losses["image"])
    noise = KEY.normal(Stream.CLASS_TOKEN, (6,))
    noised, target = Path("cosine").interpolate(context.x["class_token"], noise, context.t)
    assert torch.equal(context.noised["class_token"], noised)
    torch.testing.assert_close(
        context.losses["class_token"], (context.prediction["class_token"] - target).square().mean(1)
    )


def test_the_same_noise_at_another_time():
    context = run("tree")
    again = context.noised_at(context.t)
    assert all(torch.equal(again[name], leaf) for name, leaf in context.noised.items())
    assert torch.equal(image(context.noised_at(torch.ones(4))), image(context.noise))


def test_an_earlier_time_has_the_same_noise():
    context, shift = run("tree"), torch.tensor([0.0, 0.3, 1.0, 0.1])
    noised, times = context.earlier(shift)
    assert torch.equal(times, (context.t - shift).clamp(0, 1))
    assert times[2] == 0
    assert all(torch.equal(leaf, context.noised_at(times)[name]) for name, leaf in noised.items())
    assert torch.equal(noised["image"][0], context.noised["image"][0])
    assert context.t is context.times is context.objective.unit(context.times)


def test_its_field_is_what_the_samplers_follow():
    model, noise = Scale().double(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    field = Flow(Flow.Config(), model).field(model, Y, Guidance(2.0, 0.4, 1.0))
    with torch.no_grad():
        x = noise + (0.5 - 1) * field(noise, 1.0, 0.5)
        x = x - 0.5 * field(x, 0.5, 0.0)
    assert torch.equal(x, sample(model, noise, Y, num_steps=2, cfg_scale=2.0, guidance_low=0.4))
    assert "euler" in Flow.solvers


@pytest.mark.parametrize(("given", "shift"), [(1.0, 1.0), (3.0, 3.0), (0.0, (3 * 8 * 8 / 4096) ** 0.5)])
def test_drawn_times_are_shifted_by_a_number_or_by_the_dimension(given, shift):
    plain = Flow(Flow.Config(), Scale()).draw_times(KEY)
    objective = Flow(Flow.Config(time_shift=given), Scale())
    assert objective.time_shift == pytest.approx(shift)
    torch.testing.assert_close(objective.draw_times(KEY), shift * plain / (1 + (shift - 1) * plain))
    if given == 1:
        assert torch.equal(objective.draw_times(KEY), plain)


def test_objectives_are_known_by_name():
    assert all(objective.name == name for name, objective in OBJECTIVES.items())
