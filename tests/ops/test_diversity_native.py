"""The diversity statistics as a torch op: backends against fp64, registration, both modes of differentiation."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist

from dit_fast import _C
from dit_fast.errors import ConfigError
from dit_fast.ops import DiversityTaps, diversity_loss, diversity_op, diversity_stats
from dit_fast.ops.diversity_op import backward_op, forward_op
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, golden, golden_names

native = pytest.mark.skipif(_C.unavailable() is not None, reason=str(_C.unavailable()))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # test_interpreter.py sets it
COMPILED = [] if _C.unavailable() else ["cpp"]  # by name: the registered ops take "auto" for torch
BACKENDS = ["triton"] if INTERPRETED else ["torch", *COMPILED]
SHAPES = [(1, 1, 1), (2, 5, 7), (3, 256, 16), (5, 257, 33), (4, 300, 64), (7, 530, 100), (12, 40, 768)]


@pytest.fixture
def backend():
    """What `test_auto_is_the_library` asks for; torch's twin where the library is not built."""
    return BACKENDS[-1]


def blocks(count, tokens, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = 0.3 * torch.randn(tokens, width, generator=generator)
    return [(common + torch.randn(tokens, width, generator=generator)).to(dtype) for _ in range(count)]


def weights_of_the_outputs(count, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, count, width, generator=generator), torch.randn(count, count, generator=generator)


def in_float64(features, statistics_weight, pair_weight):
    """Statistics, pair sums and the gradient of their weighted sum by autograd through the definition."""
    wide = [x.double().requires_grad_() for x in features]
    statistics = torch.stack([torch.stack([x.sum(0), x.abs().sum(0), x.square().sum(0)]) for x in wide], 1)
    units = torch.stack([torch.nn.functional.normalize(x, dim=1, eps=1e-8) for x in wide])
    pair_sums = torch.einsum("kmd,lmd->kl", units, units)
    value = (statistics * statistics_weight).sum() + (pair_sums * pair_weight).sum()
    return statistics.detach(), pair_sums.detach(), torch.autograd.grad(value, wide)


@loop_over("variant", ["release", "paper"])
@pytest.mark.parametrize("backend", BACKENDS)
@loop_over("name", golden_names("diversity_"))
def test_published_values_and_gradients(name, backend, variant):
    data, prefix = golden(name), "paper_" if variant == "paper" else ""
    pairs = [tuple(pair) for pair in data.meta["pairs"]]
    for tapped in (False, True):
        features = [x.requires_grad_() for x in data.tensor("in/features")]
        if tapped:
            taps = DiversityTaps(backend)
            for x in features:
                taps.tap(x)
            loss = taps.loss(pairs, variant)
        else:
            loss = diversity_loss(features, pairs, variant, backend=backend)
        assert_close(loss.orthogonality, data.tensor("out/orthogonality"), 1e-5)
        assert_close(loss.mutual_information, data.tensor(f"out/{prefix}mutual_information"), 1e-5)
        assert_close(loss.dispersion, data.tensor(f"out/{prefix}dispersion"), 1e-5)
        assert_close(loss.total, data.tensor(f"out/{prefix}diversity"), 1e-5)
        grads = torch.stack(torch.autograd.grad(loss.total, features))
        assert_close(grads, data.tensor(f"grad/{prefix}features"), 1e-4)


@loop_over("dtype", [torch.float32, torch.bfloat16, torch.float16])
@loop_over("shape", SHAPES)
def test_statistics_and_their_gradient(backend, shape, dtype):
    """fp32 sums to 1e-6; gradients to the rounding of their own dtype. Outputs start as NaN, see below."""
    features = blocks(*shape, dtype)
    weights = weights_of_the_outputs(shape[0], shape[2])
    statistics, pair_sums, inverse_norms, mixture = forward_op(features, True, backend)
    expected_statistics, expected_pairs, expected = in_float64(features, *weights)
    assert_close(statistics, expected_statistics, 1e-6)
    assert_close(pair_sums, expected_pairs, 1e-6)
    norms = torch.stack(features).double().norm(dim=2)
    assert_close(inverse_norms, 1 / norms, 1e-6)
    assert_close(mixture, (torch.stack(features).double() / norms[..., None]).sum(0), 1e-6)
    grads = backward_op(features, inverse_norms, None, *weights, [], list(range(shape[0])), backend)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for grad, reference in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, reference, rounding, extra=1e-6)


@native
def test_auto_is_the_library(monkeypatch):
    used = []
    forward = torch.ops.dit_fast_native.diversity_forward
    monkeypatch.setattr(torch.ops.dit_fast_native, "diversity_forward", lambda *a: used.append(a) or forward(*a))
    features = blocks(3, 20, 8)
    stacked = [x.view(1, 20, 8) for x in features]
    assert torch.equal(diversity_loss(stacked).total, diversity_loss(stacked, backend="cpp").total)
    assert len(used) == 2


@native
def test_every_output_element_is_written(monkeypatch):
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: real(*args, **kwargs).fill_(float("nan")))
    features = blocks(3, 70, 21)
    outputs = [torch.full(shape, float("nan")) for shape in ((3, 3, 21), (3, 3), (3, 70), (70, 21))]
    torch.ops.dit_fast_native.diversity_forward(features, *outputs, -1)
    assert all(torch.isfinite(output).all() for output in outputs)
    weights = weights_of_the_outputs(3, 21)
    assert all(torch.isfinite(g).all() for g in backward_op(features, outputs[2], None, *weights, [], [2, 0], "cpp"))


@native
@loop_over("backend", ["cpp", "torch"])
def test_a_token_with_nan_has_no_norm_and_no_part_in_the_mixture(backend):
    features = blocks(2, 6, 21)
    features[1][3, 5] = torch.nan
    norms, mixture = forward_op(features, True, backend)[2:]
    assert norms[1].isnan().tolist() == mixture.isnan().all(1).tolist() == [token == 3 for token in range(6)]


@native
def test_tensors_without_elements_are_refused():
    for shape in ((0, 8), (8, 0)):
        with pytest.raises(RuntimeError, match="no elements"):
            forward_op([torch.zeros(shape)], False, "cpp")


def test_wanted_blocks_and_the_gradient_from_above(backend):
    features, above = blocks(4, 90, 20, torch.bfloat16), blocks(2, 90, 20, torch.bfloat16, seed=5)
    weights = weights_of_the_outputs(4, 20)
    inverse_norms = forward_op(features, False, backend)[2]
    expected = in_float64(features, *weights)[2]
    grads = backward_op(features, inverse_norms, None, *weights, above, [3, 1], backend)
    for grad, k, upstream in zip(grads, (3, 1), above, strict=True):
        assert (
            torch.equal(grad, (expected[k] + upstream.double()).to(torch.bfloat16))
            or ((grad.double() - expected[k] - upstream.double()).abs() <= 2**-8 * grad.double().abs() + 1e-5).all()
        )


def test_strided_mixed_and_expanded_tensors(backend):
    """Features sliced, transposed, expanded and of three dtypes; upstream gradients transposed and expanded."""
    wide = torch.randn(50, 96, generator=torch.Generator().manual_seed(3))
    features = [
        wide[:, 32:64],
        wide[:, ::3],
        torch.randn(32, 50, generator=torch.Generator().manual_seed(4)).T,
        wide[:1, :32].expand(50, 32),
        wide[:, 64:].to(torch.bfloat16),
        wide[:, :32].to(torch.float16),
    ]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in features]
    above = [wide[:, 1:33], wide[:, 2::3], torch.ones(32, 50).T, torch.ones(1, 1).expand(50, 32)]
    above += [torch.ones(1, 32, dtype=torch.bfloat16).expand(50, 32), wide[:, :32].half()]
    weights, wanted = weights_of_the_outputs(6, 32), list(range(6))
    strided, contiguous = forward_op(features, True, backend), forward_op(plain, True, backend)
    for ours, theirs in zip(strided, contiguous, strict=True):
        assert torch.equal(ours, theirs)
    expected = in_float64(features, *weights)
    assert_close(strided[1], expected[1], 1e-6)
    grads = backward_op(features, strided[2], None, *weights, above, wanted, backend)
    again = backward_op(plain, strided[2], None, *weights, [x.contiguous() for x in above], wanted, backend)
    for grad, same, x in zip(grads, again, features, strict=True):
        assert torch.equal(grad, same)
        assert grad.dtype == x.dtype


def test_strided_features_and_expanded_gradients_through_autograd(backend):
    base = torch.randn(3, 4, 10, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def total(backend):
        features = [base[0, ..., :24], base[1].transpose(0, 1)[:4, :, ::2][..., :20], base[2, ..., 16:]]
        features = [features[0], base[1, ..., 8:32], features[2]]
        taps = DiversityTaps(backend)
        outputs = [taps.tap(x) for x in features]
        return taps.loss().total + outputs[0].sum() + outputs[1].mean() + outputs[2].transpose(1, 2).sum()

    ours, reference = (torch.autograd.grad(total(name), base)[0] for name in (backend, "torch"))
    assert_close(ours, reference, 1e-6)


def test_zero_tokens_and_tiny_norms(backend):
    """Norms below 1e-8 are a constant: the gradient is V / 1e-8 there, as F.normalize has it."""
    features = blocks(3, 20, 8)
    features[0][3], features[1][4] = 0, 1e-10
    weights = weights_of_the_outputs(3, 8)
    expected = in_float64(features, *weights)
    statistics, pair_sums, inverse_norms, _ = forward_op(features, False, backend)
    assert_close(statistics, expected[0], 1e-6)
    assert_close(pair_sums, expected[1], 1e-6)
    for grad, reference in zip(
        backward_op(features, inverse_norms, None, *weights, [], [0, 1, 2], backend), expected[2], strict=True
    ):
        assert_close(grad, reference, 1e-6)


@loop_over("variant", ["release", "paper"])
def test_bfloat16_error_is_at_most_that_of_eager(backend, variant):
    """Against fp64 on the same rounded inputs: gradient error within 1.25 times eager's (kernels.md §7)."""
    features = [x.view(2, 150, 48) for x in blocks(6, 300, 48, torch.bfloat16)]

    def gradient(features, backend):
        leaves = [x.detach().requires_grad_() for x in features]
        loss = diversity_loss(leaves, "all", variant, backend=backend).total
        return loss.detach().double(), torch.stack(torch.autograd.grad(loss, leaves)).double()

    exact, ours, eager = (
        gradient(x, name)
        for x, name in (([x.double() for x in features], "torch"), (features, backend), (features, "torch"))
    )
    for place in range(2):
        error, allowed = ((side[place] - exact[place]).norm() for side in (ours, eager))
        assert error <= 1.25 * allowed + 1e-7 * exact[place].norm()


@native
@loop_over("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_on_the_instruction_set(dtype):
    """AVX2 and AVX-512 agree bit for bit; the portable version, without fused multiply-add, to 1e-6 (bf16: 4e-3)."""
    features, weights = blocks(5, 1500, 72, dtype), weights_of_the_outputs(5, 72)

    def everything(level):
        outputs = [torch.empty(shape) for shape in ((3, 5, 72), (5, 5), (5, 1500), (1500, 72))]
        grads = [torch.empty_like(x) for x in features]
        torch.ops.dit_fast_native.diversity_forward(features, *outputs, level)
        inputs = (features, outputs[2], *weights, features, list(range(5)))
        torch.ops.dit_fast_native.diversity_backward(*inputs, grads, level)
        return outputs + grads

    threads = torch.get_num_threads()
    best = torch.ops.dit_fast_native.isa_level()
    try:
        results = {}
        for count, level in itertools.product((1, 2, 3), range(best + 1)):
            torch.set_num_threads(count)
            results[count, level] = everything(level)
    finally:
        torch.set_num_threads(threads)
    for (_, level), outputs in results.items():
        for ours, same_level, reference in zip(outputs, results[1, level], results[1, best], strict=True):
            assert torch.equal(ours, same_level)
            if level:
                assert torch.equal(ours, reference)
            else:
                assert_close(ours, reference, 4e-3 if ours.dtype == torch.bfloat16 else 1e-6)


@native
def test_native_operators_name_what_they_cannot_take():
    features = blocks(2, 4, 3)
    outputs = [torch.empty(shape) for shape in ((3, 2, 3), (2, 2), (2, 4), (0, 3))]
    run = torch.ops.dit_fast_native.diversity_forward
    for change, message in (
        ([features[0], features[1].double()], "float32, bfloat16 or float16"),
        ([features[0], features[1][:3]], "differ in shape"),
        ([features[0], features[1].T.contiguous().T], "contiguous last dimension"),
        ([], "at least one"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(change, *outputs, -1)
    with pytest.raises(RuntimeError, match="level 9 is above"):
        run(features, *outputs, 9)


def test_a_backend_that_cannot_take_the_tensors_says_why():
    features = [x.view(1, 4, 3).double() for x in blocks(2, 4, 3)]
    assert diversity_op._refuses(*features) == [
        f"block {k} is torch.float64, not float32, bfloat16 or float16" for k in range(2)
    ]
    with pytest.raises(ConfigError, match=r"backend 'cpp' cannot run: (block 0 is torch.float64|libdit_fast_cpu)"):
        diversity_loss(features, backend="cpp")
    assert diversity_stats(features).sums.dtype == torch.float64


def test_opcheck(backend):
    features = blocks(3, 9, 5)
    torch.library.opcheck(forward_op.registered, (features, True, backend))
    inverse_norms = forward_op(features, False, backend)[2]
    given = (features, inverse_norms, None, *weights_of_the_outputs(3, 5), features[:2], [2, 0], backend)
    torch.library.opcheck(backward_op.registered, given)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("tapped", [False, True])
def test_compiled_values_equal_eager_ones(backend, tapped, compiler):
    def function(*features):
        if not tapped:
            return diversity_loss(features, backend=backend).total
        taps = DiversityTaps(backend)
        outputs = [taps.tap(x) for x in features]
        return taps.loss().total + sum(x.square().sum() for x in outputs)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for tokens in (12, 20):
        features = [x.view(2, tokens // 2, 6).requires_grad_() for x in blocks(3, tokens, 6)]
        ours, reference = compiled(*features), function(*features)
        assert_close(ours, reference.detach(), 1e-6)
        for grad, expected in zip(
            torch.autograd.grad(ours, features), torch.autograd.grad(reference, features), strict=True
        ):
            assert_close(grad, expected, 1e-5)


def test_statistics_ignore_autocast(backend):
    features = [x.view(1, 8, 5).requires_grad_() for x in blocks(3, 8, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = diversity_loss(features, backend=backend).total
    inside_gradient = torch.autograd.grad(inside, features)
    outside = diversity_loss(features, backend=backend).total
    assert inside.dtype == torch.float32
    assert_close(inside, outside.detach(), 1e-6)
    for ours, expected in zip(inside_gradient, torch.autograd.grad(outside, features), strict=True):
        assert_close(ours, expected, 1e-6)


def test_inside_an_activation_checkpoint(backend):
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def function(x):
        return diversity_loss([x, x.sin(), x.exp()], backend=backend).total

    expected = torch.autograd.grad(function(x), x)[0]
    again = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x)[0], expected)


def test_both_modes_of_differentiation_in_float64():
    features = [x[:, :4].double().requires_grad_() for x in blocks(3, 5, 4)]
    for inputs in (features, features[:2]):
        assert torch.autograd.gradcheck(
            lambda *x: diversity_op.statistics("torch", x), tuple(inputs), check_forward_ad=True
        )


@loop_over("tapped", [False, True])
@loop_over("variant", ["release", "paper"])
def test_forward_mode_over_a_function_whose_primal_is_trained(variant, tapped):
    """What mean flow does: a directional derivative, with reverse mode on the primal; both against differences."""
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x, direction = (
        torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )

    def loss(x, matrix):
        features = [x @ matrix, (x @ matrix).sin(), x + 0.3]
        if not tapped:
            return diversity_loss(features, "all", variant).total
        taps = DiversityTaps()
        outputs = [taps.tap(feature) for feature in features]
        return taps.loss("all", variant).total + outputs[0].square().mean()

    value, tangent = torch.func.jvp(lambda x: loss(x, matrix), (x,), (direction,))
    with torch.no_grad():
        step = 1e-6
        expected = (loss(x + step * direction, matrix) - loss(x - step * direction, matrix)) / (2 * step)
        assert_close(tangent, expected, 1e-6)
        assert_close(value, loss(x, matrix), 1e-12)
        other = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        slope = (loss(x, matrix + step * other) - loss(x, matrix - step * other)) / (2 * step)
    gradient = torch.autograd.grad(value, matrix)[0]
    assert_close((gradient * other).sum(), slope, 1e-6)


@native
def test_forward_mode_of_the_compiled_kernel():
    features, directions = blocks(3, 40, 9), blocks(3, 40, 9, seed=7)
    sides = []
    for backend, dtype in (("cpp", torch.float32), ("auto", torch.float64)):
        inputs = tuple(x.to(dtype) for x in features), tuple(x.to(dtype) for x in directions)
        sides.append(torch.func.jvp(lambda *x, name=backend: diversity_op.statistics(name, x), *inputs)[1])
    for ours, expected in zip(*sides, strict=True):
        assert_close(ours, expected, 1e-5)


def _worker(rank: int, rendezvous: str, features: torch.Tensor, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    share = [x[3 * rank : 3 + 3 * rank].clone().requires_grad_() for x in features]
    taps = DiversityTaps()
    for x in share:
        taps.tap(x)
    total = taps.loss("all", "release", "global").total
    gradient = torch.stack(torch.autograd.grad(total, share))
    torch.save({"total": total.detach(), "gradient": gradient / 2}, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_taps_of_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """Averaged over ranks, gradients are those of the whole batch; the mixture is used (5 blocks, all pairs)."""
    features = torch.stack([x.view(6, 8, 10) for x in blocks(5, 48, 10)])
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "rendezvous"), features, str(tmp_path)), nprocs=2)
    outcomes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = features.clone().requires_grad_()
    loss = diversity_loss(whole).total
    loss.backward()
    for outcome in outcomes:
        assert_close(outcome["total"], loss.detach(), 1e-6)
    assert_close(torch.cat([outcome["gradient"] for outcome in outcomes], 1), whole.grad, 1e-5)
