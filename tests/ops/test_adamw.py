"""The optimizer's pass: its definition, the C++ one, torch's fused one, and the CUDA source compiled for the CPU."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_fast import _C, backend
from dit_fast._C.build import FLAGS, OLDEST_TORCH, SOURCES, compiler
from dit_fast.ops.adamw import NUMBERS, States, adamw

SIZES = [(7, 5), (3,), (0, 4), (1000, 41), (64, 64), *[(5,)] * 50]
RULES = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.99}
needs_native = pytest.mark.skipif(_C.unavailable() is not None, reason=f"{_C.unavailable()}")


def start(seed=0, offset=0, shadow_offset=0):
    """Weights, states and shadows; offset: elements by which all but the shadows start off a 64-byte boundary."""
    generator = torch.Generator().manual_seed(seed)

    def place(values):
        return torch.empty(values.numel() + 16)[offset:][: values.numel()].view(values.shape).copy_(values)

    weights = [place(torch.randn(size, generator=generator)) for size in SIZES]
    zeros = [[place(torch.zeros(size)) for size in SIZES] for _ in range(2)]
    states = States(*zeros, [place(weight) for weight in weights], [torch.zeros(()) for _ in weights])
    lying = [torch.empty(w.numel() + 16, dtype=torch.bfloat16)[shadow_offset:] for w in weights]
    shadows = [x[: w.numel()].view(w.shape) if w.dim() > 1 else x[:0] for x, w in zip(lying, weights, strict=True)]
    return weights, states, shadows


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=generator) for size in SIZES]


def exact(steps, rules=RULES, factor=1.0):
    """The definition in numpy float32, fused where the C++ fuses (products of float32 are exact in float64)."""
    weights, states, _ = start()
    f, wide = np.float32, np.float64
    every = [[x.numpy().copy() for x in part] for part in (weights, states.first, states.second, states.ema)]
    (beta1, beta2), lr, result = rules["betas"], rules["lr"], []

    def lerp(a, b, weight):
        weight = f(weight)
        near, coefficient = (a, weight) if weight < 0.5 else (b, weight - f(1))
        return (wide(coefficient) * wide(b - a) + wide(near)).astype(f)

    for step in range(1, steps + 1):
        result = []
        for w, m, v, e, gradient in zip(*every, gradients(step), strict=True):
            g = gradient.numpy() * f(factor)
            m = lerp(m, g, 1 - beta1)
            v = (wide(f(1 - beta2) * g) * wide(g) + wide(v * f(beta2))).astype(f)
            d = np.sqrt(v) / f((1 - beta2**step) ** 0.5) + f(rules["eps"])
            w = w * f(1 - lr * rules["weight_decay"]) + f(-lr / (1 - beta1**step)) * m / d
            result.append((w, m, v, lerp(e, w, 1 - rules["ema_decay"])))
        every = [list(part) for part in zip(*result, strict=True)]
    return every


def run(steps, rules=RULES, offset=0, **options):
    weights, states, shadows = start(offset=offset)
    for step in range(1, steps + 1):
        adamw(weights, gradients(step), states, shadows=shadows, **rules, **options)
    return weights, states, shadows


def same_bits(found, expected):
    weights, states, shadows = found
    for part, wanted in zip((weights, states.first, states.second, states.ema), expected, strict=True):
        for x, y in zip(part, wanted, strict=True):
            np.testing.assert_array_equal(x.numpy(), y)
    for shadow, weight in zip(shadows, weights, strict=True):
        assert torch.equal(shadow, weight.bfloat16() if weight.dim() > 1 else shadow)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.45)])
@needs_native
def test_native_is_the_definition_bit_for_bit(betas):
    if torch.ops.dit_fast_native.isa_level() == 0:
        pytest.skip("no fused multiply-add on this processor")
    rules = RULES | {"betas": betas, "ema_decay": 0.3}
    same_bits(run(4, rules, factor=torch.tensor(0.37)), exact(4, rules, factor=0.37))


@pytest.mark.parametrize("name", ["cpp", "fused"])
def test_implementations_agree_with_the_reference(name):
    if name == "cpp" and _C.unavailable():
        pytest.skip(_C.unavailable())
    results = []
    for chosen in ("torch", name):
        with backend.force(chosen):
            results.append(run(5, factor=torch.tensor(0.5), applied=torch.tensor(1.0)))
    (weights, states, _), (others, theirs, shadows) = results
    pairs = [*zip(weights, others, strict=True), *zip(states.ema, theirs.ema, strict=True)]
    pairs += [*zip(states.second, theirs.second, strict=True), *zip(states.counts, theirs.counts, strict=True)]
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-6, atol=2e-7)
    assert torch.equal(shadows[0], others[0].bfloat16())


@pytest.mark.parametrize("name", ["torch", "cpp", "fused"])
def test_where_it_is_not_applied_nothing_moves(name):
    if name == "cpp" and _C.unavailable():
        pytest.skip(_C.unavailable())
    with backend.force(name):
        weights, states, shadows = run(2)
        before = [x.clone() for x in (*weights, *states.first, *states.second, *states.ema, *states.counts, *shadows)]
        bad = [torch.full_like(weight, float("nan")) for weight in weights]
        options = {"factor": torch.tensor(float("nan")), "applied": torch.tensor(0.0), "shadows": shadows}
        adamw(weights, bad, states, **RULES, **options)
    after = (*weights, *states.first, *states.second, *states.ema, *states.counts, *shadows)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)


@needs_native
@pytest.mark.parametrize("spoil", ["gradient", "shadow", "count"])
def test_what_does_not_fit_is_refused(spoil):
    weights, states, shadows = start()
    grads = gradients(1)
    if spoil == "gradient":
        grads[0] = grads[0].T.contiguous().T
    elif spoil == "shadow":
        shadows[0] = shadows[0].float()
    else:
        states.counts[0] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=f"adamw: a {spoil}"):
        adamw(weights, grads, states, shadows=shadows, **RULES)


def test_weights_that_are_not_contiguous_are_left_to_torch():
    weights, states, shadows = start()
    weights[0] = weights[0].T.contiguous().T
    adamw(weights, gradients(1), states, shadows=shadows, **RULES)
    for weight, expected in zip(weights, run(1)[0], strict=True):
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("name", ["torch", "cpp", "fused"])
def test_a_backward_through_weights_of_before_is_refused(name):
    if name == "cpp" and _C.unavailable():
        pytest.skip(_C.unavailable())
    weights, states, shadows = start()
    weight = weights[4].requires_grad_()
    loss = weight.square().sum()
    with backend.force(name):
        adamw(weights, gradients(1), states, shadows=shadows, **RULES)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    if compiler() is None:
        pytest.skip("no C++ compiler")
    torch_folder, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("shim") / "shim.so"
    command = [compiler(), *FLAGS, f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-I{torch_folder / 'include'}"]
    command += [f"-I{SOURCES}", "-shared", str(Path(__file__).parent / "adamw_shim.cpp"), "-o", str(library)]
    subprocess.run([*command, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"], check=True)
    torch.ops.load_library(str(library))
    return torch.ops.dit_fast_shim


@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 2)])
def test_the_cuda_source_is_the_definition_bit_for_bit(shim, offsets):
    """Aligned; not so; not so the shadows alone. 55 tensors are two launches of each kernel."""
    weights, states, shadows = start(0, *offsets)
    scratch, factor, lr = torch.empty(NUMBERS * len(weights)).double(), torch.tensor(0.37), torch.tensor(1e-3).double()
    lr.fill_(RULES["lr"])
    rules = (*RULES["betas"], RULES["eps"], RULES["weight_decay"], RULES["ema_decay"], scratch, 0)
    lists = (states.first, states.second, states.ema, shadows, states.counts, lr, factor)
    before = shim.launches()
    for step in range(1, 4):
        shim.adamw_ema_(weights, gradients(step), *lists, torch.tensor(1.0), *rules)
    assert shim.launches() - before == 3 * 4
    bad = [torch.full_like(weight, float("nan")) for weight in weights]
    shim.adamw_ema_(weights, bad, *lists, torch.tensor(0.0), *rules)
    same_bits((weights, states, shadows), exact(3, factor=0.37))
    assert {count.item() for count in states.counts} == {3.0}
