"""Dispersive Loss: values and gradients against published ones and the plain equations, over ranks, and its method."""

import math
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from dit_fast.errors import ConfigError
from dit_fast.methods import build_methods
from dit_fast.methods.dispersive import Dispersive, Variant, dispersive_loss
from dit_fast.models import new_model
from dit_fast.recipes import load
from dit_fast.train.__main__ import main
from tests.helpers.cases import loop_over, refused
from tests.helpers.deterministic_fill import fill
from tests.helpers.golden import assert_close, golden, golden_names
from tests.helpers.tiny_sit import inputs_for, tiny_sit
from tests.helpers.toy_runs import arguments, rows

NAMES, VARIANTS = golden_names("disploss_"), get_args(Variant)


def features(count=5, tokens=3, width=4, seed=0, dtype=torch.float64):
    return torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(feature, variant, tau=0.5, margin=1.0):
    """The equations, pair by pair."""
    z = feature.flatten(1)
    count, width = z.shape
    distance = [[(a - b).square().sum() / width for b in z] for a in z]
    cosine = [[(a * b).sum() / a.norm() / b.norm() for b in z] for a in z]
    everything = [(i, j) for i in range(count) for j in range(count)]
    pairs = [(i, j) for i, j in everything if i != j]
    if variant == "infonce_l2":
        return sum((-distance[i][j] / tau).exp() for i, j in everything).div(count**2).log()
    if variant == "infonce_cosine":
        return sum((cosine[i][j] / tau).exp() for i, j in everything).div(count**2).log()
    if variant == "hinge":
        return sum((margin - distance[i][j]).clamp_min(0).square() for i, j in pairs) / len(pairs)
    covariance = torch.cov(z.T)
    return covariance.square().sum() - covariance.diagonal().square().sum()


@pytest.mark.parametrize("name", NAMES)
def test_published_values_and_gradients(name):
    file = golden(name)
    for case, tau in file.meta["tau"].items():
        feature = file.tensor("in/features").requires_grad_()
        loss = dispersive_loss(feature, "infonce_l2", tau)
        loss.backward()
        assert_close(loss, file.tensor(f"out/{case}"), 2e-6)
        assert_close(feature.grad, file.tensor(f"grad/{case}"), 2e-6)


def test_recorded_values():
    """methods.md §7.4."""
    z = fill("golden.z", (4, 6), 4).reshape(4, 2, 3)
    for tau, expected in ((0.5, -1.3761986192), (1.0, -1.2561306283)):
        assert dispersive_loss(z, tau=tau).item() == pytest.approx(expected, abs=1e-10)


@loop_over("variant", VARIANTS)
def test_values_and_derivatives_follow_the_equations(variant):
    x = features().requires_grad_()
    options = {"tau": 0.7, "margin": 1.8}
    ours, theirs = dispersive_loss(x, variant, **options), plain(x, variant, **options)
    assert_close(ours, theirs, 1e-12)
    assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0], 1e-11)
    assert torch.autograd.gradgradcheck(lambda x: dispersive_loss(x, variant, **options), x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        narrow = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = dispersive_loss(narrow, variant, **options)
        loss.backward()
        assert loss.dtype == torch.float32
        assert narrow.grad.dtype == dtype
        assert_close(loss, dispersive_loss(narrow.double(), variant, **options), tolerance)


@loop_over("dtype", [torch.float32, torch.float64])
def test_identical_samples(dtype):
    """methods.md §7.5, item 18: with the diagonal, 0 where all are identical; and their gradient is 0, not NaN."""
    x = features(1, dtype=dtype).expand(3, -1, -1).clone().requires_grad_()
    for variant, value in zip(VARIANTS, (0.0, 2.0, 1.0, 0.0), strict=True):
        loss = dispersive_loss(x, variant)
        (gradient,) = torch.autograd.grad(loss, x)
        assert_close(loss, torch.tensor(value), 0, 1e-6)
        assert gradient.abs().max() < 1e-6
    assert dispersive_loss(x[:1]).item() == 0
    two = torch.cat([x[:2], x[2:] + 1]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(dispersive_loss(two), two)
    assert_close(gradient[0], gradient[1], 1e-5)
    assert gradient[2].norm() > 0


def test_near_samples_far_from_the_origin_keep_their_distance():
    """In float32, what all samples share does not count: the differences here are 1e-4 of it."""
    apart = torch.tensor([1e-2, 1e-2, 3, 3], dtype=torch.float64)[:, None, None]
    x = (features(4, 16, 64) * apart + 100).float().requires_grad_()
    wide = x.detach().double().requires_grad_()
    losses = [dispersive_loss(each, "hinge") for each in (x, wide)]
    for loss in losses:
        loss.backward()
    assert_close(losses[0], losses[1], 2e-6)
    assert_close(x.grad, wide.grad, 1e-4)


@loop_over(
    ("arguments", "message"),
    [
        ((torch.zeros(2),), "must be [N, T, D]"),
        ((torch.zeros(2, 0, 3),), "not empty"),
        ((torch.zeros(2, 3, dtype=torch.int64),), "floating point"),
        ((torch.zeros(2, 3, 4), "infonce"), "unknown dispersive loss 'infonce'; valid: infonce_l2"),
        ((torch.zeros(2, 3, 4), "hinge", 0.5, 1.0, "all"), "unknown scope 'all'"),
        ((torch.zeros(2, 3, 4), "infonce_l2", 0.0), "tau must be positive, not 0.0"),
        ((torch.zeros(2, 3, 4), "hinge", 0.5, math.nan), "margin must be positive, not nan"),
        ((torch.zeros(1, 3, 4), "hinge"), "over pairs of samples, and there is only 1"),
        ((torch.zeros(1, 3, 4), "covariance"), "over pairs of samples, and there is only 1"),
    ],
)
def test_what_is_refused(arguments, message):
    assert message in refused(dispersive_loss, *arguments)


def _worker(rank: int, rendezvous: str, x: torch.Tensor, weight: torch.Tensor, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    outcome = {}
    for variant in VARIANTS:
        for scope in ("rank", "global"):
            matrix = weight.clone().requires_grad_()
            loss = dispersive_loss(x[rank::2] @ matrix, variant, scope=scope)
            loss.backward()
            dist.all_reduce(matrix.grad)
            outcome[f"{variant}/{scope}"] = torch.cat([loss.detach()[None], matrix.grad.flatten() / 2])
    torch.save(outcome, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_the_global_scope_equals_one_process_with_the_whole_batch(tmp_path):
    """Two ranks: value and averaged gradient of every variant; those of the rank scope differ."""
    x, weight = features(6, dtype=torch.float32), 0.3 * features(1, 4, 4, seed=1, dtype=torch.float32)[0]
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "meet"), x, weight, str(tmp_path)), nprocs=2)
    outcomes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for variant in VARIANTS:
        matrix = weight.clone().requires_grad_()
        loss = dispersive_loss(x @ matrix, variant, scope="global")
        loss.backward()
        for outcome in outcomes:
            assert_close(outcome[f"{variant}/global"], torch.cat([loss.detach()[None], matrix.grad.flatten()]), 1e-6)
            assert abs(outcome[f"{variant}/rank"][0] - loss) > 1e-3 * abs(loss)


def test_the_term_is_of_the_block_counted_from_one():
    model: Any = tiny_sit()
    nothing: Any = None
    for config, block in ((Dispersive.Config(), 0), (Dispersive.Config(depth=4, tau=1.0, weight=0.25), 3)):
        (method,) = build_methods([config], model, nothing)
        assert method.blocks == {block}
        _, outputs = model(*inputs_for(model), taps=method.blocks)
        context: Any = SimpleNamespace(features=outputs)
        term = method.terms(context)["dispersive/loss"]
        assert_close(term.value, dispersive_loss(outputs[block], tau=config.tau), 0)
        assert term.weight == config.weight
    with pytest.raises(ConfigError, match=r"methods\.dispersive\.depth=5 is not one of this model's blocks 1\.\.4"):
        build_methods([Dispersive.Config(depth=5)], model, nothing)


@loop_over(("name", "block"), [("dispersive-b2-256", 2), ("dispersive-l2-256", 5), ("dispersive-xl2-256", 6)])
def test_recipes_have_the_published_setting_of_the_jax_code(name, block):
    config = load(name)
    nothing: Any = None
    with torch.device("meta"):
        (method,) = build_methods(config.methods, new_model(config.model), nothing)
    assert method.blocks == {block}
    assert (method.config.weight, method.config.tau, config.engine.micro_batch) == (0.5, 0.5, 16)


def test_a_batch_of_one_sample_is_refused_before_the_first_step(shards, tmp_path, capsys):
    command = arguments(shards, tmp_path / "run", "methods=dispersive", "run.steps=2")
    for variant, reason in (("infonce_l2", "is constant with one sample"), ("hinge", "has no pair with one sample")):
        chosen = ("engine.micro_batch=1", f"methods.dispersive.variant={variant}")
        assert main([*command, *chosen]) == 2
        assert f"methods.dispersive.variant={variant} {reason}" in capsys.readouterr().err
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(command) == 0
    assert all(-math.log(2) < row["dispersive/loss"] <= 1e-6 for row in rows(tmp_path / "run"))
