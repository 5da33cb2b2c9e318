"""DiverseDiT's pair policies, adaptive weight and term."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from dit_fast.checkpoint import load_official
from dit_fast.data.field import Field
from dit_fast.diffusion import Path, velocity_error
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods import build_methods
from dit_fast.methods.diversedit import DiverseDiT, adaptive_weight, select_pairs
from dit_fast.methods.repa import REPA
from dit_fast.models import Taps, build_model
from dit_fast.ops import diversity_loss
from dit_fast.ops.draws import Key
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, golden, golden_names


def run(first, *seconds):
    return [(first, second) for second in seconds]


@loop_over(
    ("depth", "blocks", "expected"),
    [
        (8, 12, run(1, *range(2, 12))),
        (8, 24, run(1, *range(2, 12))),
        (8, 28, run(1, *range(2, 12))),
        (5, 12, run(4, *range(5, 12)) + run(5, 6, 7, 8)),
        (5, 24, run(4, *range(5, 15))),
        (4, 12, run(5, *range(6, 12)) + run(6, 7, 8, 9, 10)),
        (4, 28, run(5, *range(6, 16))),
        (None, 12, run(0, *range(1, 11))),
        (None, 4, list(combinations(range(4), 2))),
        (9, 12, run(0, *range(1, 11))),
        (1, 12, run(8, 9, 10, 11) + run(9, 10, 11) + run(10, 11)),
        (3, 4, run(2, 3)),
    ],
)
def test_release_pairs(depth, blocks, expected):
    assert select_pairs("release", blocks, depth) == expected


def test_all_and_anchor_pairs():
    assert select_pairs("all", 5) == list(combinations(range(5), 2))
    assert select_pairs("anchor", 12, 8) == sorted(
        [*run(7, 8, 9, 10, 11), (6, 7), (5, 7), (4, 7), (3, 7), (2, 7), (1, 7)]
    )
    assert select_pairs("anchor", 28, 8) == run(7, *range(8, 18))
    assert select_pairs("anchor", 12) == run(0, *range(1, 11))
    assert select_pairs("anchor", 28, 8, k=3) == run(7, 8, 9, 10)


def test_random_layers_are_redrawn_each_step_and_repeat():
    drawn = [select_pairs("random_layers", 24, k=10, seed=1, step=step) for step in range(30)]
    for pairs in drawn:
        layers = sorted({block for pair in pairs for block in pair})
        assert len(layers) == 10
        assert pairs == list(combinations(layers, 2))
    assert len({tuple(pairs) for pairs in drawn}) > 25
    assert {block for pairs in drawn for pair in pairs for block in pair} == set(range(24))
    assert drawn[3] == select_pairs("random_layers", 24, k=10, seed=1, step=3)
    assert drawn[3] != select_pairs("random_layers", 24, k=10, seed=2, step=3)
    assert select_pairs("random_layers", 6, k=10) == list(combinations(range(6), 2))


@loop_over(
    ("arguments", "message"),
    [
        (("release", 12, 10), "starts at block -1.*encoder_depth <= 9"),
        (("release", 8, 1), "finds none for 8 blocks"),
        (("release", 12, 13), r"encoder_depth=13.*1\.\.12"),
        (("release", 12, 0), "encoder_depth=0"),
        (("ancor", 12, 5), "'ancor'.*release, anchor, random_layers, all"),
        (("random_layers", 12, None, 1), "k=1"),
        (("anchor", 12, None, 0), "k=0"),
        (("all", 1), "compares blocks, and the model has one"),
    ],
)
def test_bad_pair_policies_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        select_pairs(*arguments)


# methods.md §2.5: loss, detached weight, the code's effective multiplier d(wL)/dL, the continuous weight.
WEIGHTS = [
    (0.7, 1.0, 1.0, 1.0),
    (0.500001, 1.0, 1.0, 1.0),
    (0.5, 0.8, 1.8, 1.0),
    (0.4, 0.6, 1.4, 0.75),
    (0.3, 0.4, 1.0, 0.5),
    (0.2, 0.2, 0.6, 0.25),
    (0.100001, 0.000002, 0.200004, 0.0000025),
    (0.1, 0.0, 0.0, 0.0),
    (-0.3, 0.0, 0.0, 0.0),
]


@loop_over(("value", "weight", "multiplier", "continuous"), WEIGHTS)
def test_adaptive_weight(value, weight, multiplier, continuous):
    for detach, slope in ((True, weight), (False, multiplier)):
        loss = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        w = adaptive_weight(loss, detach=detach)
        assert w.item() == pytest.approx(weight, abs=1e-12)
        (w * loss).backward()
        assert loss.grad.item() == pytest.approx(slope, abs=1e-12)
    loss = torch.tensor(value, dtype=torch.float64)
    assert all(adaptive_weight(loss * torch.nan, form=form).isnan() for form in ("paper", "continuous"))
    assert adaptive_weight(loss, form="continuous").item() == pytest.approx(continuous, abs=1e-12)


@loop_over(
    ("loss", "weight"),
    [(0.0016018489, 0), (0.3677005898, 0.5354011795), (0.4437101009, 0.6874202019), (0.1015913237, 0.0031826474)],
)
def test_adaptive_weight_of_the_table(loss, weight):
    assert adaptive_weight(torch.tensor(loss, dtype=torch.float64)).item() == pytest.approx(weight, abs=1e-9)


@loop_over("name", golden_names("diversity_"))
def test_published_pairs_and_weight(name):
    data = golden(name)
    meta, features = data.meta, data.tensor("in/features")
    depth = meta["encoder_depth"] if meta["projection"] else None
    pairs = select_pairs("release", len(features), depth)
    assert pairs == [tuple(pair) for pair in meta["pairs"]]
    weight = adaptive_weight(diversity_loss(features, pairs).total)
    assert_close(weight, data.tensor("out/adaptive_weight").float(), 1e-5)


def test_unusable_ranges_and_forms_are_named():
    with pytest.raises(UserError, match=r"low=0.5, high=0.1"):
        adaptive_weight(torch.tensor(0.3), 0.5, 0.1)
    with pytest.raises(UserError, match=r"finite .* high=inf"):
        adaptive_weight(torch.tensor(0.3), high=float("inf"))
    with pytest.raises(UserError, match=r"'linear'.*paper, continuous"):
        adaptive_weight(torch.tensor(0.3), form="linear")


def random_features(blocks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {block: torch.randn(3, 7, 6, generator=generator) + 0.5 for block in blocks}


def bound(**options):
    """The method for a model of 12 blocks."""
    return DiverseDiT(DiverseDiT.Config(**options), SimpleNamespace(depth=12), None)


def term_of(method, features, seed=0, number=0):
    """Its term for these outputs of all blocks, of which it takes those that it asks for."""
    taps = Taps(method.blocks, {"diversedit": (method.collector(), method.blocks)})
    for block, feature in features.items():
        if block in taps:
            taps(block, feature)
    key = Key(seed, torch.arange(3))
    return method.terms(SimpleNamespace(taps=taps, key=key, number=number))["diversedit/total"]


def test_term_carries_loss_weight_and_logs():
    features = random_features(range(12))
    term = term_of(bound(encoder_depth=8), features)
    expected = diversity_loss(list(features.values()), select_pairs("release", 12, 8))
    assert_close(term.value, expected.total, 1e-6)
    assert_close(term.weight, adaptive_weight(expected.total), 1e-6)
    assert_close(term.logs["diversedit/orthogonality"], expected.orthogonality, 1e-6)
    assert set(term.logs) == {
        f"diversedit/{k}" for k in ("orthogonality", "mutual_information", "dispersion", "weight")
    }


@loop_over(("pairs", "blocks"), [("release", range(4, 12)), ("anchor", range(4, 8))])
def test_paper_variant_asks_for_and_reads_only_the_blocks_in_the_pairs(pairs, blocks):
    k = {"k": 3} if pairs == "anchor" else {}
    method = bound(pairs=pairs, encoder_depth=5, variant="paper", **k)
    assert method.blocks == set(blocks)
    features = random_features(range(12))
    expected = diversity_loss(list(features.values()), select_pairs(pairs, 12, 5, **k), "paper").total
    assert_close(term_of(method, features).value, expected, 1e-6)


def test_release_variant_and_random_layers_ask_for_all_blocks():
    for options in ({}, {"pairs": "random_layers", "k": 3, "variant": "paper"}):
        assert bound(**options).blocks == set(range(12))


@loop_over("variant", ["release", "paper"])
def test_random_layers_follow_the_step(variant):
    method = bound(pairs="random_layers", k=3, variant=variant)
    features = random_features(range(12))
    for step in range(3):
        pairs = select_pairs("random_layers", 12, k=3, seed=4, step=step)
        expected = diversity_loss(list(features.values()), pairs, variant)
        assert_close(term_of(method, features, seed=4, number=step).value, expected.total, 1e-6)


def test_constant_weight_and_attached_weight():
    features = random_features(range(12))
    assert term_of(bound(weight="constant", weight_constant=0.25), features).weight == 0.25
    leaves = {block: feature.requires_grad_() for block, feature in features.items()}
    for detach in (True, False):
        assert term_of(bound(pairs="all", detach_weight=detach), leaves).weight.requires_grad != detach


def test_pairs_that_do_not_fit_are_refused_when_it_is_built():
    with pytest.raises(ConfigError, match=r"encoder_depth=13.*1\.\.12"):
        bound(encoder_depth=13)


@pytest.mark.parametrize("name", golden_names("diversedit_", "repa_", "sit_"))
def test_published_training_loss_and_gradients(name):
    """The composition as a trainer uses it: taps, terms and weights give the published loss and all its gradients."""
    data = golden(name)
    meta, diverse, aligned = data.meta, name.startswith("diversedit_"), bool(data.meta["projection"])
    depth = meta["encoder_depth"] if aligned else None
    width = len(data.tensor("state/projectors.0.0.bias"))
    configs = []
    if diverse:
        configs.append(DiverseDiT.Config(encoder_depth=depth, detach_weight=False))
    if aligned:
        configs.append(
            REPA.Config(encoder_depth=meta["encoder_depth"], weight=meta["proj_coeff"], projector_width=width)
        )
    model = load_official(
        data.group("state/"),
        family="diversedit" if diverse else "repa",
        num_heads=meta["num_heads"],
        skip_wiring=meta["skip_wiring"] if diverse else None,
    )
    x, t, y, noise, z = (data.tensor(f"in/{key}") for key in ("x", "t", "y", "noise", "z"))
    weights = model.state_dict()
    del model.projectors
    methods = build_methods(
        configs, model, SimpleNamespace(field=lambda name: Field(f"{name}.npy", z.shape[1:], "float32"))
    )
    model.load_state_dict(weights, strict=aligned)
    noised, target = Path(meta["path_type"]).interpolate(x, noise, t)
    taps = Taps(range(model.depth), {m.name: (m.collector(), m.blocks) for m in methods if m.collector()})
    prediction = model(noised, t, y, taps)
    context = SimpleNamespace(features=taps.features, taps=taps, batch={"features": z})
    terms = {name: term for method in methods for name, term in method.terms(context).items()}
    loss = velocity_error(prediction, target).mean()
    for term in terms.values():
        loss = loss + term.weight * term.value
    loss.backward()
    assert_close(loss, data.tensor("out/loss"), 1e-5)
    if diverse:
        assert_close(terms["diversedit/total"].value, data.tensor("out/diversity"), 1e-5)
        assert_close(terms["diversedit/total"].weight, data.tensor("out/diversity_weight").float(), 1e-5)
    if aligned:
        assert_close(terms["repa/alignment"].value, data.tensor("out/projection"), 1e-5)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    reference = data.group("grad/")
    whole = (
        torch.stack([value.norm() for value in data.group("gradnorm/").values() or reference.values()]).norm().item()
    )
    for key, value in reference.items():
        assert_close(gradients[key], value, 1e-4, extra=1e-7 * whole)
    for key, value in data.group("gradnorm/").items():
        assert_close(gradients[key].norm(), value.reshape(()), 1e-4, extra=1e-7 * whole)


@loop_over("wiring", ["off", "input", "output"])
@loop_over("pairs", ["release", "all"])
@loop_over("recompute", ["none", "selective", "full"])
def test_taps_in_the_model_give_the_gradients_of_the_plain_loss(wiring, pairs, recompute):
    """The collector folds the loss into each block's backward; without it the loss reads the features. fp64 to 1e-9."""
    torch.manual_seed(0)
    sizes = {"input_size": 4, "hidden_size": 24, "depth": 6, "num_heads": 2, "num_classes": 3}
    model = build_model("SiT-Nano/2", **sizes, skip_wiring=wiring).double()
    model.activation_checkpointing = recompute
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = DiverseDiT.Config(pairs=pairs, weight="constant", weight_constant=2.0)
    x, t, y = torch.randn(3, 4, 4, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64), torch.tensor([0, 1, 2])
    sides = []
    for tapped in (False, True):
        if tapped:
            method = DiverseDiT(config, model, None)
            taps = Taps(method.blocks, {"diversedit": (method.collector(), method.blocks)})
            v = model(x, t, y, taps)
            value = method.terms(SimpleNamespace(taps=taps))["diversedit/total"].value
        else:
            v, features = model(x, t, y, range(6))
            value = diversity_loss(features, select_pairs(pairs, 6)).total
        model.zero_grad()
        (v.square().mean() + 2.0 * value).backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        sides.append((value.detach(), torch.cat(grads)))
    for ours, expected in zip(*reversed(sides), strict=True):
        assert_close(ours, expected, 1e-9)
