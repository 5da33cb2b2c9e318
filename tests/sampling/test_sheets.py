"""Pictures between seeds and along a sampling: their ends are the images that the command draws."""

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.checkpoint.run import load_run
from dit_fast.cli import main
from dit_fast.errors import UserError
from dit_fast.sampling import sheets
from dit_fast.sampling.images import Drawing
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.sheets import interpolation, slerp, strips

NAMES = ["dark", "grey", "light"]


@pytest.fixture(scope="module")
def run(place):
    """A run with a model that draws something: its head is not zero."""
    loaded = load_run(place / "plain")
    torch.manual_seed(0)
    torch.nn.init.normal_(loaded.model.final_layer.linear.weight, std=0.1)
    return loaded


@pytest.fixture
def columns(monkeypatch):
    """What is put on the sheets: title -> (images, labels)."""
    seen = {}
    monkeypatch.setattr(sheets, "class_grid", lambda columns, *_: seen.update(columns))
    return seen


def drawing(run, **options):
    dataset = run.dataset()
    chosen = SampleOptions(**{"num_steps": 3, "classes": (0, 2), "chunk": 4, **options}).resolved(run, dataset)
    return Drawing(run, chosen, torch.device("cpu"), dataset)


def alone(run, **options):
    """The first image of each class, as the command draws it."""
    made = drawing(run, per_class=1, **options)
    index = torch.arange(2)
    return made.pictures(made.latents(made.noise(index), made.options.labels_of(index), index)).astype(int)


def test_an_interpolation_goes_from_one_seed_to_the_other(run, columns):
    interpolation(drawing(run, per_class=3), (5, 9), NAMES)
    ((title, (images, labels)),) = columns.items()
    assert title == "heun, 3 steps, guidance 2.5, seed 5 to seed 9"
    assert labels.tolist() == [0, 0, 0, 2, 2, 2]
    images = images.astype(int)
    for end, seed in ((0, 5), (2, 9)):
        assert np.abs(images[end::3] - alone(run, seed=seed)).max() <= 1
    middle = [np.abs(images[1::3] - images[end::3]).mean() for end in (0, 2)]
    assert min(middle) > 1
    assert sum(middle) < 1.5 * np.abs(images[0::3] - images[2::3]).mean()


def test_the_way_between_two_noises_keeps_their_length():
    a, b = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    found = slerp(a, b, share)
    torch.testing.assert_close(found[0], a[0])
    torch.testing.assert_close(found[4], b[4])
    lengths = [x.flatten(1).norm(dim=1) for x in (a, b, found)]
    assert (lengths[2] > 0.95 * torch.minimum(*lengths[:2])).all()
    angles = torch.cosine_similarity(a.flatten(1), found.flatten(1)).acos()
    whole = torch.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
    torch.testing.assert_close(angles, share * whole, rtol=0, atol=0.05)  # exact for numbers of one length


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_a_strip_ends_in_the_image_that_is_drawn(run, columns, sampler):
    """With chunks of one image too: each keeps its row. The last Euler step leads to its prediction of x."""
    for chunk in (1, 4):
        columns.clear()
        strips(drawing(run, sampler=sampler, num_steps=5, chunk=chunk), 3, NAMES)
        times = [float(title.removeprefix("t = ")) for title in list(columns)[:-1]]
        assert len(times) == 3
        assert times[0] == 1
        assert times == sorted(times, reverse=True)
        images = [picture.astype(int) for picture, _ in columns.values()]
        assert np.abs(images[-1] - alone(run, sampler=sampler, num_steps=5)).max() <= 1
        assert np.abs(images[0] - images[-1]).max() > 2


def test_the_last_prediction_is_the_image(run, columns):
    strips(drawing(run, sampler="euler", num_steps=2), 2, NAMES)
    (_, before, last) = (picture.astype(int) for picture, _ in columns.values())
    assert np.abs(before - last).max() <= 1


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda it: interpolation(it, (1, 1), NAMES), {}, "from seed 1 to itself"),
        (lambda it: interpolation(it, (0, 1), NAMES), {"per_class": 1}, "two ends; give 2 or more"),
        (lambda it: interpolation(it, (0, 1), NAMES), {"sampler": "sde"}, "adds noise of its own"),
        (lambda it: interpolation(it, (0, 1), NAMES), {"count": 8}, "drop count"),
        (lambda it: strips(it, 4, NAMES), {}, "strips=4: this sampling has 1 to 3 times"),
        (lambda it: strips(it, 0, NAMES), {}, "strips=0"),
        (lambda it: strips(it, 1, NAMES), {"sampler": "dopri5"}, "predicts nothing at fixed times"),
    ],
)
def test_what_cannot_be_shown_is_refused(run, make, options, message):
    with pytest.raises(UserError, match=message):
        make(drawing(run, **options))


def test_the_command_writes_pictures(place, tmp_path, capsys):
    fixed = ["sample", str(place / "diverse"), "--num-steps", "2"]
    wide, high = tmp_path / "i.png", tmp_path / "s.png"
    assert main([*fixed, "--interpolate", "0", "1", "--per-class", "5", "-o", str(wide)]) == 0
    assert main([*fixed, "--strips", "2", "-o", str(high)]) == 0
    assert Image.open(wide).width > 5 * 64
    assert Image.open(high).height > 3 * 64
    for wrong, message in (
        (["--interpolate", "0", "1", "-o", "a.npz"], "its name must end in .png"),
        (["--interpolate", "0", "1", "--seed", "3"], "drop --seed"),
        (["--strips", "2", "--per-class", "3"], "drop --per-class"),
    ):
        capsys.readouterr()
        assert main([*fixed, *wrong]) == 2
        assert message in capsys.readouterr().err
