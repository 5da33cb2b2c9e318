"""Samplers: closed forms on Gaussian data, guidance, randomness, and independence of the split into batches."""

import pytest
import torch
from torch import nn

from dit_fast.diffusion import SOLVERS, initial_noise, sample
from dit_fast.diffusion.guidance import Guidance, Velocity
from dit_fast.diffusion.paths import Path
from dit_fast.errors import UserError
from dit_fast.models import build_model
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close


class Exact(nn.Module):
    """Exact velocity of data drawn from N(0.5, 0.5^2)."""

    def __init__(self, path="linear"):
        super().__init__()
        self.path = Path(path)

    def forward(self, x, t, y):
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t[:, None])
        centred = (x - alpha * 0.5) / ((alpha * 0.5) ** 2 + sigma**2)
        return d_alpha * (0.5 + alpha * 0.25 * centred) + d_sigma * sigma * centred


class Small(nn.Module):
    """A model with parameters, a null label and a record of its calls."""

    def __init__(self, null_label=3):
        super().__init__()
        torch.manual_seed(0)
        self.null_label, self.calls = null_label, []
        self.mix, self.table = nn.Linear(18, 18), nn.Embedding(null_label + 1, 18)

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), x.dtype, self.training))
        return (torch.tanh(self.mix(x.flatten(1))) * (1 + t[:, None]) + self.table(y)).view_as(x)


class SingleTime(Small):
    times = 1


NOISY = {"sampler": "sde", "num_steps": 3, "draws": torch.zeros(2, 2, 2, 3, 3)}


def labels(count):
    return torch.arange(count) % 3


@loop_over(
    ("sampler", "num_steps", "slope"),
    [
        ("euler", 10, 0.4307826049),
        ("euler", 50, 0.4853967383),
        ("euler", 250, 0.4970452435),
        ("heun", 10, 0.4908129576),
        ("heun", 50, 0.4996809050),
        ("heun", 250, 0.4999876467),
    ],
)
def test_ode_on_gaussian_data(sampler, num_steps, slope):
    noise = torch.tensor([[-1.5], [0.0], [2.0]], dtype=torch.float64)
    assert_close(sample(Exact(), noise, labels(3), sampler, num_steps), 0.5 + slope * noise, 1e-9)


@loop_over(("num_steps", "std"), [(50, 0.4920546895), (250, 0.4943431060)])
def test_sde_on_gaussian_data(num_steps, std):
    """The exact velocity is affine, so one unit impulse per source of noise gives the exact standard deviation."""
    impulses = torch.eye(num_steps + 1, dtype=torch.float64)[:, :num_steps]  # the last row: no noise at all
    sde, velocity = SOLVERS["sde"], Velocity(Exact(), labels(num_steps + 1), Guidance())
    draw = lambda step: impulses[:, step + 1 : step + 2]  # noqa: E731
    *_, rows = sde(velocity, impulses[:, :1], sde.grid(num_steps), Path("linear"), draw)
    mean, responses = rows[-1], rows[:-1] - rows[-1]
    assert mean.item() == pytest.approx(0.5, abs=1e-12)
    assert responses.norm().item() == pytest.approx(std, abs=1e-10)


def test_sde_on_the_cosine_path_reaches_the_data():
    """The score must use the path's coefficients: with the linear ones the result is far off."""
    noise = initial_noise(1, torch.arange(4000), (1,))
    draws = [
        sample(Exact("cosine"), noise, labels(4000), "sde", 100, path=p, generator=torch.Generator().manual_seed(0))
        for p in ("cosine", "linear")
    ]
    assert draws[0].mean().item() == pytest.approx(0.5, abs=0.03)
    assert draws[0].std().item() == pytest.approx(0.5, abs=0.03)
    assert abs(draws[1].std().item() - 0.5) > 0.05


@loop_over(("sampler", "evaluations"), [("euler", 250), ("heun", 499), ("sde", 250)])
def test_number_of_evaluations(sampler, evaluations):
    model = Small()
    sample(model, torch.zeros(1, 2, 3, 3), labels(1), sampler, 250, generator=torch.Generator())
    assert len(model.calls) == evaluations


def test_guidance_interval_is_closed_and_costs_nothing_outside():
    model = Small()
    sample(model, torch.ones(2, 2, 3, 3), labels(2), "euler", 10, 2.0, guidance_low=0.2, guidance_high=1.0)
    assert [rows for rows, *_ in model.calls] == [4] * 9 + [2]
    model.calls.clear()
    sample(model, torch.ones(2, 2, 3, 3), labels(2), "euler", 10, 2.0, guidance_high=0.7)
    assert [rows for rows, *_ in model.calls] == [2, 2, 2] + [4] * 7
    model.calls.clear()
    sample(model, torch.ones(2, 2, 3, 3), labels(2), "euler", 10, 1.0)
    assert [rows for rows, *_ in model.calls] == [2] * 10


def test_heun_keeps_the_decision_of_the_first_evaluation():
    model = Small()
    sample(model, torch.ones(2, 2, 3, 3), labels(2), "heun", 4, 2.0, guidance_low=0.5, guidance_high=0.75)
    assert [(rows, t) for rows, t, *_ in model.calls] == [
        (2, 1.0), (2, 0.75), (4, 0.75), (4, 0.5), (4, 0.5), (4, 0.25), (2, 0.25),
    ]  # fmt: skip


@loop_over("scale", [1.8, 0.5, 0.0, -1.0])
def test_every_scale_but_one_mixes_label_and_null_label(scale):
    """One Euler step over the whole path shows the velocity."""
    model, x, y = Small(), torch.randn(2, 2, 3, 3), labels(2)
    t = torch.ones(2)
    with torch.no_grad():
        conditional, null = model(x, t, y).double(), model(x, t, torch.full((2,), 3)).double()
    assert_close(
        x.double() - sample(model, x, y, num_steps=1, cfg_scale=scale), null + scale * (conditional - null), 1e-6
    )


def test_first_three_channels_are_guided_where_the_model_says_so():
    class Four(Small):
        def __init__(self):
            super().__init__()
            self.mix, self.table = nn.Linear(16, 16), nn.Embedding(4, 16)

    model, x, y = Four(), torch.randn(2, 4, 2, 2), labels(2)
    plain, every = (sample(model, x, y, num_steps=1, cfg_scale=scale) for scale in (1.0, 3.0))
    model.cfg_channels = "first_three"
    three = sample(model, x, y, num_steps=1, cfg_scale=3.0)
    assert torch.equal(three[:, :3], every[:, :3])
    assert_close(three[:, 3:], plain[:, 3:], 1e-6)
    assert torch.equal(sample(model, x, y, num_steps=1, cfg_scale=3.0, cfg_channels="all"), every)


@loop_over("dtype", [torch.float32, torch.float64])
def test_state_is_float64_and_the_model_sees_its_own_dtype(dtype):
    model = Small().to(dtype)
    assert sample(model, torch.ones(1, 2, 3, 3), labels(1), num_steps=2).dtype == torch.float64
    assert {call[2] for call in model.calls} == {dtype}


def test_training_mode_is_suspended_and_put_back():
    model = Small().train()
    model.mix.eval()
    sample(model, torch.ones(1, 2, 3, 3), labels(1), num_steps=1)
    assert not model.calls[0][3]
    assert (model.training, model.mix.training, model.table.training) == (True, False, True)


def test_generator_gives_one_normal_of_the_state_per_noisy_step():
    model, noise = Small(), torch.randn(3, 2, 3, 3)
    ours = sample(model, noise, labels(3), "sde", 5, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(4)
    draws = [torch.randn(3, 2, 3, 3, dtype=torch.float64) for _ in range(4)]
    theirs = sample(model, noise, labels(3), "sde", 5, draws=draws)
    assert torch.equal(ours, theirs)


@loop_over("sampler", ["euler", "heun", "rk4", "sde", "sde_heun"])
@loop_over("chunk", [4, 7])
def test_image_k_does_not_depend_on_the_split(sampler, chunk):
    """methods.md §7.5, item 22: the same bytes for any order and any share of the indices, at equal chunk size."""
    model, count = Small(), 11
    y = labels(count)

    def run(index, **options):
        noise = initial_noise(5, index, (2, 3, 3))
        return sample(model, noise, y[index], sampler, 4, 1.5, seed=5, index=index, **{"chunk": chunk, **options})

    whole = run(torch.arange(count))
    for index in (torch.tensor([6]), torch.arange(3, 9), torch.arange(count)[1::2], torch.randperm(count)):
        assert torch.equal(run(index), whole[index])
    torch.testing.assert_close(run(torch.arange(count), chunk=64), whole, rtol=1e-5, atol=1e-5)


def test_seed_and_index_decide_the_noise():
    index = torch.tensor([0, 9, 2**40])
    first = initial_noise(3, index, (2, 4, 4))
    assert first.dtype == torch.float64
    assert torch.equal(first[1:2], initial_noise(3, index[1:2], (2, 4, 4)))
    assert not torch.equal(first, initial_noise(4, index, (2, 4, 4)))
    noise = torch.zeros(2, 2, 3, 3)
    drawn = [sample(Small(), noise, labels(2) * 0, "sde", 4, seed=s, index=torch.arange(2)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_solvers_yield_the_state_after_each_step():
    times = [1.0, 0.7, 0.0]
    states = list(SOLVERS["euler"](lambda x, t, s: x / t, torch.ones(1, 2), times))
    assert_close(torch.stack(states), torch.tensor(times[1:])[:, None, None].expand(2, 1, 2), 1e-6)


class Joint(nn.Module):
    """Denoises an image and a class token, each alone, so that a tree must give what two tensors give."""

    null_label = 3

    def forward(self, x, t, y):
        label = (1.0 + y).double()
        rates = {"image": label[:, None, None, None], "class_token": -2 * label[:, None]}
        if isinstance(x, torch.Tensor):
            x = {"image" if x.dim() == 4 else "class_token": x}
            return next(iter({name: leaf * rates[name] for name, leaf in x.items()}.values()))
        return {name: leaf * rates[name] for name, leaf in x.items()}


@loop_over("sampler", ["euler", "heun", "sde"])
def test_trees_are_sampled_leaf_by_leaf_with_scales_and_streams_of_their_own(sampler):
    index, shapes = torch.arange(5), {"image": (2, 3, 3), "class_token": (7,)}
    noise = initial_noise(1, index, shapes)
    assert torch.equal(noise["image"], initial_noise(1, index, (2, 3, 3)))
    keyed = {"seed": 1, "index": index, "chunk": 4, "guidance_high": 0.8}
    both = sample(Joint(), noise, labels(5), sampler, 4, 2.0, class_token_cfg_scale=0.5, **keyed)
    assert torch.equal(both["image"], sample(Joint(), noise["image"], labels(5), sampler, 4, 2.0, **keyed))
    token = {"class_token": noise["class_token"]}
    assert torch.equal(both["class_token"], sample(Joint(), token, labels(5), sampler, 4, 0.5, **keyed)["class_token"])
    assert (noise["class_token"] != noise["image"].flatten(1)[:, :7]).all()


def test_mean_flow_gives_the_model_both_times():
    seen = []

    def model(x, t, y):  # the mean of v = 2 t between t and r
        seen.append(t.tolist())
        return (t[:, 0] + t[:, 1])[:, None].expand_as(x)

    done = sample(model, torch.zeros(1, 2), labels(1), "mean_flow", 2)
    assert seen == [[[1.0, 0.5]], [[0.5, 0.0]]]
    assert_close(done, torch.full((1, 2), -1.0), 1e-12)


@loop_over(
    ("change", "message"),
    [
        ({"sampler": "lsoda"}, "'lsoda'; valid: euler, heun"),
        (
            {"sampler": "mean_flow", "model": SingleTime()},
            "'mean_flow' does not fit a model with 1 time; use euler, heun",
        ),
        ({"noise": {"image": torch.zeros(2, 2, 3, 3), "text": torch.zeros(2, 5)}}, "unknown leaf 'text'"),
        ({"noise": {"image": torch.zeros(2, 2, 3, 3), "class_token": torch.zeros(3, 5)}}, "equally many rows"),
        ({"class_token_cfg_scale": float("inf")}, "class_token_cfg_scale=inf"),
        ({"class_token_cfg_scale": 2.0}, "class_token_cfg_scale=2.0 is for a class token, and noise has none"),
        ({"sampler": "sde"}, "generator="),
        ({"seed": 1, "index": torch.arange(2), "generator": torch.Generator()}, "not both"),
        ({"seed": 1}, "belong together"),
        ({"index": torch.arange(2)}, "belong together"),
        ({"seed": 1, "index": torch.tensor([3, 3])}, "different"),
        ({"seed": 1, "index": torch.tensor([-1, 3])}, ">= 0"),
        ({"seed": 1, "index": torch.arange(3)}, r"\[2\]"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, r"\[3\]"),
        ({"path": "gvp"}, "path 'gvp'"),
        ({"cfg_scale": 2.0, "model": Exact()}, "null_label"),
        ({"cfg_scale": 2.0, "guidance_low": 0.8, "guidance_high": 0.2}, "swap"),
        ({"cfg_scale": float("nan")}, "cfg_scale=nan"),
        ({"cfg_scale": float("-inf")}, "cfg_scale=-inf"),
        ({"guidance_high": float("nan")}, "guidance_high=nan"),
        ({"guidance_low": -0.1}, "guidance_low=-0.1"),
        ({"cfg_channels": "last"}, "cfg_channels='last'"),
        ({"num_steps": 10**12}, "num_steps=1000000000000"),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"chunk": 0}, "chunk=0"),
        ({"seed": 2**64, "index": torch.arange(2)}, "seed=18446744073709551616"),
        ({"seed": -1, "index": torch.arange(2)}, "seed=-1"),
        ({"noise": torch.zeros(2, 2, 3, 3, dtype=torch.int64)}, "floating point"),
        ({"noise": torch.tensor([[0.0], [float("nan")]])}, "noise row 1"),
        ({"y": torch.zeros(2)}, "int64"),
        ({"sampler": "sde", "num_steps": 3, "draws": torch.zeros(1, 2, 2, 3, 3)}, "2 tensors"),
        ({"draws": torch.zeros(1), "seed": 0, "index": torch.arange(2)}, "not both"),
        ({"model": lambda x, t, y: x[:, :1]}, "returned"),
        ({"model": lambda x, t, y: (x, {})}, "returned a tuple"),
        ({"noise": [0.0]}, "not a list"),
        ({"y": [0, 1]}, "not a list"),
        ({"y": labels(2).to("meta")}, "y must be a dense tensor with values"),
        ({"noise": torch.zeros(2, 2, 3, 3).to_sparse()}, "noise must be a dense tensor"),
        ({"cfg_scale": 10**400}, "cfg_scale=1000"),
        ({"seed": 0, "index": [0, 1]}, "index must be int64"),
        ({"sampler": "sde", "generator": 3}, "generator must be a torch.Generator, not a int"),
        ({"sampler": "sde", "num_steps": 3, "draws": iter([])}, "draws must be 2 tensors"),
        ({"sampler": "sde", "num_steps": 3, "draws": [None, None]}, "draws must be 2 tensors"),
        ({"diffusion": "sigma"}, "'euler' takes no diffusion; drop it, or use sde, sde_heun"),
        ({"sampler": "sde", "atol": 1e-3}, "'sde' takes no atol; drop it, or use dopri5"),
        ({**NOISY, "diffusion": "brownian"}, "unknown diffusion 'brownian'; valid: constant, sbdm"),
        ({**NOISY, "diffusion_norm": -1.0}, "diffusion_norm=-1.0 must be a finite number, 0 or more"),
        ({**NOISY, "last_step": "heun"}, "unknown last_step 'heun'; valid: mean, euler, tweedie, none"),
        ({**NOISY, "last_step_size": float("nan")}, "last_step_size=nan"),
        ({**NOISY, "last_step_size": 0}, "last_step_size=0 does not fit last_step='mean'; 0 is 'none'"),
        ({**NOISY, "last_step": "none", "last_step_size": 0.1}, "last_step_size=0.1 does not fit last_step='none'"),
        (
            {**NOISY, "last_step_size": 0.2, "time_range": (1, 0.1)},
            "=0.2 leads beyond the data from t=0.1",
        ),
        ({**NOISY, "last_step_size": 1.0}, "noisy steps from t=1.0 to 1.0 do not go down; last_step_size must be"),
        ({**NOISY, "num_steps": 1, "last_step": "none"}, "num_steps=1 of sampler 'sde' is its last step alone"),
        ({**NOISY, "num_steps": 1, "draws": [], "last_step": "tweedie"}, "divides by alpha, which is 0 at t=1.0"),
        (
            {**NOISY, "diffusion": "sbdm", "time_range": (1, 0.1)},
            "'sbdm' is infinite at t=1.0 on the linear",
        ),
        ({**NOISY, "sampler": "sde_heun", "last_step": "none"}, "the score is infinite at t=0.0 on the linear path"),
        ({"sampler": "dopri5", "atol": 0}, "atol=0 asks for more"),
        ({"sampler": "dopri5", "times": [1, 0.5, 0]}, r"chooses its steps between two times; give times=\(from, to\)"),
        ({"sampler": "dopri5", "time_shift": 2}, "'dopri5' chooses its steps itself; drop time_shift="),
        ({"times": [1, 0], "time_range": (1, 0)}, "drop time_range="),
        ({"times": [1, 0], "time_shift": 2.0}, "drop time_shift="),
        ({"times": [1.0]}, "times must be two or more times"),
        ({"times": [0.0, 1.0]}, "times must descend, from noise to data, and 1.0 follows 0.0"),
        ({"times": [1.0, float("nan")]}, "times holds nan"),
        ({"times": [1.0, -0.1]}, "times holds -0.1; a time lies in"),
        ({"times": ["1", "0"]}, "times holds '1'"),
        ({"time_range": (0.0, 1.0)}, "time_range must descend"),
        ({"time_range": 0.5}, "time_range must be two or more times, not 0.5"),
        ({"time_range": (1, 0.5, 0)}, r"time_range must be two times, \(from, to\)"),
        ({"time_shift": 0}, "time_shift=0 must be a finite number above 0"),
        ({"time_shift": float("inf")}, "time_shift=inf"),
        ({"sampler": "mean_flow", "model": Exact(), "path": "cosine"}, "on the linear path, not 'cosine'; drop path="),
        ({"prediction": "epsilon"}, "unknown prediction 'epsilon'; valid: velocity, score, noise, x"),
        (
            {"prediction": "noise", "time_range": (1, 0)},
            "infinite at t=1.0 on the linear path; stay within",
        ),
        ({"prediction": "noise", "path": "cosine", "time_range": (1, 0)}, "infinite at t=1.0 on the cosine path"),
        (
            {"prediction": "noise", "path": "vp", "times": [1, 0], "sampler": "heun2"},
            "infinite at t=0.0 on the vp",
        ),
        ({"prediction": "x", "t_eps": 0, "sampler": "heun2"}, "'x' is infinite at t=0.0"),
        ({"prediction": "noise", "sampler": "mean_flow", "model": Exact()}, "'noise' is not of a mean velocity"),
        ({"prediction": "x", "t_eps": 1.0}, r"t_eps=1.0 must be a time in \(0, 1\)"),
        ({"t_eps": 0.1}, "t_eps=0.1 has no effect here: .* from a prediction of x; drop t_eps="),
        ({"prediction": "x", "t_eps": 0.1, "field": lambda *given: Small()}, "t_eps=0.1 has no effect here"),
        ({"null_label": -1}, "null_label=-1 must be a whole number"),
        ({"guidance_bounds": "open"}, "guidance_bounds='open' must be one of inclusive, exclusive"),
        ({"heun_guidance": "last"}, "heun_guidance='last' must be one of first, each"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"model": Small(), "noise": torch.zeros(2, 2, 3, 3), "y": labels(2), **change}
    with pytest.raises(UserError, match=message):
        sample(**arguments)


def test_labels_that_the_model_does_not_have_are_named():
    sizes = {"input_size": 4, "patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    noise = torch.zeros(2, 4, 4, 4)
    sample(build_model("SiT-S/2", **sizes), noise, torch.tensor([0, 3]), num_steps=1)  # 3 is the null label
    undropped = build_model("SiT-S/2", **sizes, label_dropout=0.0)
    for model, label in ((build_model("SiT-S/2", **sizes), 4), (build_model("SiT-S/2", **sizes), -1), (undropped, 3)):
        with pytest.raises(UserError, match=rf"y\[1\] = {label} is no label of this model; its labels are 0\.\.2"):
            sample(model, noise, torch.tensor([0, label]), num_steps=1)
    with pytest.raises(UserError, match=r"cfg_scale=0\.5 needs a model with a trained null_label"):
        sample(undropped, noise, torch.tensor([0, 1]), num_steps=1, cfg_scale=0.5)


def test_conditions_are_numbers_or_tensors_and_reach_the_model_beside_the_null_label():
    """Guidance replaces the label alone; rows that fill a chunk have an omega by which can be divided."""
    seen = []

    def model(x, t, y):
        seen.append(y)
        return 0 * x + (1 / y["omega"] + y["label"])[:, None, None, None]

    x, y = torch.zeros(2, 1, 2, 2), labels(2)
    told = {"label": y, "omega": torch.tensor([2.0, 4.0]), "t_min": 0.25}
    drawn = sample(model, x, told, "mean_flow", 1, 3.0, null_label=5)
    assert drawn[:, 0, 0, 0].tolist() == [9.5, 6.75]
    assert seen[0]["label"].tolist() == [0, 1, 5, 5]
    assert seen[0]["omega"].tolist() == [2, 4, 2, 4]
    assert seen[0]["t_min"].tolist() == [0.25] * 4
    single = sample(model, x[:1], {"label": y[:1], "omega": 2.0}, "mean_flow", 1, seed=0, index=torch.tensor([1]))
    assert single[0, 0, 0, 0] == -0.5
    assert seen[-1]["omega"].isfinite().all()
    for wrong in ("much", float("nan"), torch.ones(3), y):
        with pytest.raises(UserError, match=r"y\['omega'\] must be a finite number or floats \[2\]"):
            sample(model, x, {"label": y, "omega": wrong}, "mean_flow", 1)
    with pytest.raises(UserError, match=r"labels y must be int64 \[2\]"):
        sample(model, x, {"omega": 2.0}, "mean_flow", 1)
