"""A condition that is kept for several steps: which steps encode, what each half of a guided batch keeps, refusals."""

import pytest
import torch

from dit_fast.diffusion import sample
from dit_fast.errors import UserError
from dit_fast.sampling.options import SampleOptions
from tests.helpers.tiny_sit import tiny_sit


class Recorder:
    """Counts rows that are encoded; the condition is x itself at that time, and the velocity its tanh by the label."""

    null_label = 9

    def __init__(self):
        self.encoded = []

    def encode(self, x, t, y):
        self.encoded.append((round(float(t[0]), 6), y.tolist()))
        return torch.tanh(x + y[:, None, None, None])

    def decode(self, x, condition):
        return condition - 0.1 * x

    def __call__(self, x, t, y):
        return self.decode(x, self.encode(x, t, y))


NOISE, LABELS = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1])


def drawn(model, **options):
    return sample(model, NOISE, LABELS, **{"num_steps": 4, **options})


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_refresh_in_every_step_changes_nothing(sampler):
    options = {"sampler": sampler, "cfg_scale": 2.0}
    assert torch.equal(drawn(Recorder(), **options), drawn(Recorder(), **options, state_refresh=1))


def test_only_every_so_many_th_step_encodes_in_all_its_evaluations():
    for sampler, times in (("euler", [1.0, 0.5]), ("heun", [1.0, 0.75, 0.5, 0.25])):
        model = Recorder()
        drawn(model, sampler=sampler, state_refresh=2)
        assert model.encoded == [(t, [0, 1]) for t in times]
    assert not torch.equal(drawn(Recorder(), state_refresh=2), drawn(Recorder()))


def euler(refresh, low, high, scale):
    """What the published sampler computes: both halves in every step, guided or not."""
    model, x = Recorder(), NOISE
    null, kept = torch.full_like(LABELS, 9), None
    for step in range(4):
        t = torch.full((2,), 1 - step / 4).double()
        if step % refresh == 0:
            kept = [model.encode(x, t, y) for y in (LABELS, null)]
        label, free = (model.decode(x, condition) for condition in kept)
        x = x - (free + (scale if low <= t[0] <= high else 1) * (label - free)) / 4
    return x


@pytest.mark.parametrize("refresh", [1, 2, 3, 4])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.6), (0.4, 0.8), (0.6, 1)])
def test_both_halves_keep_conditions_of_one_age_wherever_guidance_is_off(refresh, low, high):
    options = {"cfg_scale": 3.0, "guidance_low": low, "guidance_high": high, "state_refresh": refresh}
    torch.testing.assert_close(drawn(Recorder(), **options), euler(refresh, low, high, 3.0))


def test_a_half_that_nothing_wants_is_not_encoded():
    model = Recorder()
    drawn(model, cfg_scale=3.0, guidance_high=0.6, state_refresh=4)
    assert model.encoded == [(1.0, [0, 1]), (1.0, [9, 9])]  # the second at the first guided step, of the kept time
    model = Recorder()
    drawn(model, cfg_scale=3.0, guidance_low=0.9, state_refresh=2)
    assert model.encoded == [(1.0, [0, 1, 9, 9]), (0.5, [0, 1])]


def test_chunks_of_indices_keep_conditions_of_their_own():
    noise, labels = torch.cat((NOISE, NOISE.flip(3), NOISE.neg())), torch.tensor([0, 1, 2, 3, 4, 5])
    options = {"num_steps": 5, "cfg_scale": 2.0, "guidance_high": 0.7, "state_refresh": 3, "seed": 1, "chunk": 4}
    whole = sample(Recorder(), noise, labels, index=torch.arange(6), **options)
    later = sample(Recorder(), noise[4:], labels[4:], index=torch.arange(4, 6), **options)
    assert torch.equal(whole[4:], later)


def test_refusals():
    model = tiny_sit()
    noise, y = torch.randn(1, 3, 8, 8), torch.tensor([1])
    for options, named in (
        ({"state_refresh": 2}, "state_refresh=2 keeps the condition of an encoder .*this SiT has none"),
        ({"state_refresh": 0}, "state_refresh=0 must be a whole number from 1"),
        ({"state_refresh": 2, "sampler": "dopri5"}, "sampler 'dopri5' takes its own"),
    ):
        with pytest.raises(UserError, match=named):
            sample(model, noise, y, num_steps=2, **options)
    with pytest.raises(UserError, match="state_refresh=-1"):
        SampleOptions(state_refresh=-1)
    options = SampleOptions(sampler="euler", num_steps=4, cfg_scale=1.0, state_refresh=2)
    assert "encoder in every 2. step" in options.text()
    assert options.arguments()["state_refresh"] == 2


def test_an_open_upper_end_leaves_out_pure_noise_where_the_released_sampler_does():
    class Strict(Recorder):
        guides_noise = False

    options = {"cfg_scale": 3.0, "guidance_bounds": "exclusive", "state_refresh": 1, "num_steps": 2}
    for kind, first in ((Recorder, [0, 1, 9, 9]), (Strict, [0, 1])):
        model = kind()
        drawn(model, **options)
        assert model.encoded[0] == (1.0, first)
        assert model.encoded[1] == (0.5, [0, 1, 9, 9])
