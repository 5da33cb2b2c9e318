"""Diversity loss: published goldens, the table of methods.md §7.3, a materialised restatement, and its contract."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dit_fast.errors import UserError
from dit_fast.ops import diversity_loss, diversity_stats, diversity_tap
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, golden, golden_names

TERMS = ("orthogonality", "mutual_information", "dispersion")


def table_features() -> torch.Tensor:
    b, n, t, d = torch.meshgrid(*(torch.arange(float(k), dtype=torch.float64) for k in (12, 2, 4, 8)), indexing="ij")
    return torch.sin(0.7 * b + 1.3 * n + 0.9 * t + 0.4 * d) + 0.1 * b


def materialised(features, pairs, variant="release"):
    """The terms from features, pair by pair and block by block, as the equations read."""
    unit = lambda x, dim: torch.nn.functional.normalize(x, dim=dim, eps=1e-8)  # noqa: E731
    means = [f.mean((0, 1)) for f in features]
    orth = sum((unit(means[i], 0) * unit(means[j], 0)).sum() for i, j in pairs) / len(pairs)
    cosines = [(unit(features[i], -1) * unit(features[j], -1)).sum(-1).mean() for i, j in pairs]
    release = variant == "release"
    mi = sum(c.abs() if release else c for c in cosines) / len(pairs)
    blocks = range(len(features)) if release else sorted(set(itertools.chain(*pairs)))
    usage = sum(unit(features[b].flatten(0, 1), 0).abs().mean(0) for b in blocks) / (len(blocks) + 1e-8)
    variance = (usage / (usage.max() + 1e-8)).var(correction=0)
    disp = -(variance / 0.25).clamp(0, 1) if release else -variance
    return orth, mi, disp, (orth + mi + disp) / 3 if release else 0.33 * (orth + mi + disp)


def random_features(k=5, n=3, t=7, d=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, n, t, d, generator=generator, dtype=dtype)


@loop_over("variant", ["release", "paper"])
@loop_over("name", golden_names("diversity_"))
def test_published_values_and_gradients(name, variant):
    data, prefix = golden(name), "paper_" if variant == "paper" else ""
    features = data.tensor("in/features").requires_grad_()
    loss = diversity_loss(features, [tuple(pair) for pair in data.meta["pairs"]], variant)
    loss.total.backward()
    assert_close(loss.orthogonality, data.tensor("out/orthogonality"), 1e-5)
    assert_close(loss.mutual_information, data.tensor(f"out/{prefix}mutual_information"), 1e-5)
    assert_close(loss.dispersion, data.tensor(f"out/{prefix}dispersion"), 1e-5)
    assert_close(loss.total, data.tensor(f"out/{prefix}diversity"), 1e-5)
    assert_close(features.grad, data.tensor(f"grad/{prefix}features"), 1e-4)


E8, E5 = [(1, j) for j in range(2, 12)], [(4, j) for j in range(5, 12)] + [(5, 6), (5, 7), (5, 8)]
E4, NONE = [(5, j) for j in range(6, 12)] + [(6, j) for j in range(7, 11)], [(0, j) for j in range(1, 11)]


@loop_over(
    ("pairs", "orth", "mi", "total", "norm", "element", "norms"),
    [
        (E8, -0.4133543198, 0.4189475112, 0.0016018489, 0.1097661020, -0.0019856138, (0.3267877238, 0.0606290225)),
        (E5, 0.7419862864, 0.3619031276, 0.3677005898, 0.0463966743, -0.0000176630, (0.1263943978, 0.0589445557)),
        (E4, 0.8732073815, 0.4587105661, 0.4437101009, 0.0464410483, -0.0000176630, (0.0621311098, 0.1016110579)),
        (NONE, -0.1530649277, 0.4586265436, 0.1015913237, None, None, None),
        ("all", 0.2678322859, 0.4375266338, 0.2348570916, 0.0369866948, 0.0007590584, (0.1130226613, 0.0147201644)),
    ],
)
def test_table_of_the_release_variant(pairs, orth, mi, total, norm, element, norms):
    features = table_features().requires_grad_()
    loss = diversity_loss(features, pairs)
    values = [loss.orthogonality.item(), loss.mutual_information.item(), loss.dispersion.item(), loss.total.item()]
    assert values == pytest.approx([orth, mi, -0.0007876447, total], abs=2e-10)
    if norm is None:
        return
    gradient = lambda value: torch.autograd.grad(value, features, retain_graph=True)[0]  # noqa: E731
    assert gradient(loss.total).norm().item() == pytest.approx(norm, abs=2e-10)
    assert gradient(loss.total)[3, 1, 2, 5].item() == pytest.approx(element, abs=2e-10)
    assert gradient(loss.orthogonality).norm().item() == pytest.approx(norms[0], abs=2e-10)
    assert gradient(loss.mutual_information).norm().item() == pytest.approx(norms[1], abs=2e-10)
    assert gradient(loss.dispersion).norm().item() == pytest.approx(0.0029539503, abs=2e-10)


@loop_over(("pairs", "mi"), [(E8, -0.1262278973), (E5, 0.2856924454), (E4, 0.4587105661), (NONE, -0.0550981702)])
def test_paper_variant_keeps_the_sign(pairs, mi):
    assert diversity_loss(table_features(), pairs, "paper").mutual_information.item() == pytest.approx(mi, abs=2e-10)


@loop_over("variant", ["release", "paper"])
@loop_over("pairs", ["all", [(0, 1)], [(3, 1), (0, 4), (0, 4)]])
@loop_over("shape", [(5, 3, 7, 6), (5, 1, 1, 3), (5, 2, 33, 17)])
def test_statistics_equal_materialised_features(shape, pairs, variant):
    """fp32 to 1e-5, fp64 to 1e-12, values and gradients (methods.md §7.5, item 8)."""
    listed = list(itertools.combinations(range(5), 2)) if pairs == "all" else pairs
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        ours, theirs = (random_features(*shape, dtype=dtype).requires_grad_() for _ in range(2))
        loss, expected = diversity_loss(ours, pairs, variant), materialised(theirs, listed, variant)
        assert loss.total.dtype == dtype
        for value, reference in zip([getattr(loss, term) for term in TERMS] + [loss.total], expected, strict=True):
            assert_close(value, reference.detach(), tol, extra=tol)
        loss.total.backward()
        expected[-1].backward()
        assert_close(ours.grad, theirs.grad, 10 * tol)


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_gradcheck(variant):
    features = random_features(3, 2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: diversity_loss(f, "all", variant).total, features)


def test_sequences_stacks_and_strided_features_agree():
    features = random_features()
    expected = diversity_loss(features).total
    assert torch.equal(diversity_loss(list(features)).total, expected)
    wide = torch.randn(5, 7, 3, 12)
    wide[..., ::2] = features.transpose(1, 2)
    assert_close(diversity_loss([f[..., ::2].transpose(0, 1) for f in wide]).total, expected, 1e-6)


@loop_over("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_fp32(dtype):
    features = random_features().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = diversity_loss(features)
    assert loss.total.dtype == torch.float32
    assert_close(loss.total, diversity_loss(features.detach().float()).total, 1e-6)
    loss.total.backward()
    assert features.grad.dtype == dtype


def test_all_pairs_are_listed_in_order():
    assert diversity_loss(random_features(4)).pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@loop_over("variant", ["release", "paper"])
def test_identical_blocks_give_the_maximum(variant):
    loss = diversity_loss([random_features(1)[0]] * 4, "all", variant)
    assert loss.orthogonality.item() == pytest.approx(1, abs=1e-6)
    assert loss.mutual_information.item() == pytest.approx(1, abs=1e-6)


def test_no_gradient_reaches_blocks_outside_the_pairs_without_dispersion():
    """methods.md §7.5, item 6."""
    features = random_features().requires_grad_()
    loss = diversity_loss(features, [(1, 3)])
    (loss.orthogonality + loss.mutual_information).backward()
    assert [bool(block.abs().sum() > 0) for block in features.grad] == [False, True, False, True, False]
    features.grad = None
    diversity_loss(features, [(1, 3)]).dispersion.backward()
    assert all(bool(block.abs().sum() > 0) for block in features.grad)


def test_zero_features_and_zero_channels_have_finite_gradients():
    features = random_features()
    features[1], features[2, ..., 3] = 0, 0
    features.requires_grad_()
    loss = diversity_loss(features)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.isfinite(features.grad).all()


@loop_over("bad", [float("nan"), float("inf")])
@loop_over("variant", ["release", "paper"])
def test_non_finite_features_make_the_total_nan(bad, variant):
    features = random_features()
    features[2, 0, 0, 0] = bad
    assert torch.isnan(diversity_loss(features, "all", variant).total)


def test_fewer_than_two_blocks_give_zero():
    for features in (random_features(1), [random_features(1)[0]], random_features(0)):
        loss = diversity_loss(features)
        assert [loss.total, loss.orthogonality, loss.mutual_information, loss.dispersion] == [0, 0, 0, 0]
        assert loss.pairs == ()


@loop_over(
    ("change", "message"),
    [
        ({"pairs": []}, "empty"),
        ({"pairs": [(0, 5)]}, r"pair \(0, 5\).*0\.\.4"),
        ({"pairs": [(-1, 0)]}, r"pair \(-1, 0\)"),
        ({"pairs": [(0, 1), (2, 2)]}, r"pair \(2, 2\)"),
        ({"pairs": "release"}, "select_pairs"),
        ({"variant": "code"}, "variant 'code'.*release, paper"),
        ({"scope": "world"}, "scope 'world'.*rank, global"),
        ({"backend": "cuda"}, "backend 'cuda'.*torch"),
        ({"features": torch.zeros(3, 4, 5)}, r"features\[0\] must be \[N, T, D\], not \[4, 5\]"),
        (
            {"features": [torch.ones(1, 2, 3), torch.ones(1, 2, 4)]},
            r"features\[1\] must be \[N, T, D\] = \[1, 2, 3\], not \[1, 2, 4\]",
        ),
        ({"features": torch.zeros(3, 0, 4, 5)}, "at least one element"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(UserError, match=message):
        diversity_loss(**{"features": random_features(), **change})


class NoHostRead(TorchDispatchMode):
    """Fails on every operator whose result the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["release", "paper"])
@pytest.mark.parametrize("pairs", ["all", [(0, 1), (1, 4)]])
def test_no_host_synchronisation(variant, pairs):
    features = random_features().requires_grad_()
    with NoHostRead():
        diversity_loss(features, pairs, variant).total.backward()
    features = features.detach()
    with torch._subclasses.FakeTensorMode() as mode:
        assert diversity_loss(mode.from_tensor(features), pairs, variant).total.shape == ()


def test_the_guard_of_the_test_above_works():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostRead():
        torch.ones(()).item()


def test_statistics_are_the_sums_they_claim_to_be():
    features = random_features(3)
    stats, flat = diversity_stats(features), features.flatten(1, 2)
    assert_close(stats.sums, flat.sum(1), 1e-6)
    assert_close(stats.abs_sums, flat.abs().sum(1), 1e-6)
    assert_close(stats.square_sums, flat.square().sum(1), 1e-6)
    unit = flat / flat.norm(dim=-1, keepdim=True)
    assert_close(stats.pair_sums, torch.einsum("imd,jmd->ij", unit, unit), 1e-6)
    assert stats.count == 21


def test_tap_is_the_identity_and_folds_the_gradient_of_its_statistics():
    x = random_features(1, dtype=torch.float64)[0].requires_grad_()
    same, stats = diversity_tap(x)
    assert torch.equal(same, x)
    plain = diversity_stats(x[None])
    for name in ("sums", "abs_sums", "square_sums", "pair_sums", "count"):
        assert torch.equal(getattr(stats, name), getattr(plain, name))

    def function(x, tap):
        same, stats = diversity_tap(x) if tap else (x, diversity_stats(x[None]))
        return same.sin().sum() + stats.sums.sin().sum() + (stats.abs_sums / stats.square_sums.sqrt()).square().sum()

    expected = torch.autograd.grad(function(x, False), x)[0]
    assert_close(torch.autograd.grad(function(x, True), x)[0], expected, 1e-12)
    assert_close(torch.autograd.grad(diversity_tap(x)[0].sum(), x)[0], torch.ones_like(x), 0)


def _worker(rank: int, rendezvous: str, shares: list, weights: torch.Tensor, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(shares))
    outcome = {}
    for scope, variant in itertools.product(("rank", "global"), ("release", "paper")):
        matrix = weights.clone().requires_grad_()
        loss = diversity_loss([share @ matrix for share in shares[rank]], "all", variant, scope)
        loss.total.backward()
        dist.all_reduce(matrix.grad)
        outcome[f"{scope}/{variant}/total"] = loss.total.detach()
        outcome[f"{scope}/{variant}/grad"] = matrix.grad / len(shares)
    torch.save(outcome, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_global_scope_equals_one_process_with_the_whole_batch(tmp_path):
    """Two ranks with unequal shares (methods.md §7.5, item 9): value and averaged gradient; the rank scope differs."""
    features = random_features(4, 5, dtype=torch.float64) + 0.1
    weights = random_features(1, 1, 6, 6, dtype=torch.float64, seed=1)[0, 0]
    shares = [features[:, :2], features[:, 2:]]
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "rendezvous"), shares, weights, str(tmp_path)), nprocs=2)
    outcomes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for variant in ("release", "paper"):
        matrix = weights.clone().requires_grad_()
        whole = diversity_loss([f @ matrix for f in features], "all", variant, "global")
        whole.total.backward()
        for outcome in outcomes:
            assert_close(outcome[f"global/{variant}/total"], whole.total.detach(), 1e-12)
            assert_close(outcome[f"global/{variant}/grad"], matrix.grad, 1e-12)
            assert (outcome[f"rank/{variant}/total"] - whole.total).abs() > 1e-3
