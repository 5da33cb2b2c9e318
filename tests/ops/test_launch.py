"""The short way to a kernel hands Triton's C function what the ordinary way does, with either version of Triton."""

import pytest

from tests.helpers.triton_scripts import run_compiling
from tests.ops.install_triton import VERSIONS

SCRIPT = """
from dit_fast.benchmarks import null_driver
null_driver.install()
import torch, triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from dit_fast.kernels import adaln, gelu, ordinary_launches, qk_norm
from dit_fast.kernels import long_skip_backward, long_skip_forward, long_skip_rows

ordinary, given = [], []
run = JITFunction.run
JITFunction.run = lambda self, *arguments, **options: ordinary.append(1) or run(self, *arguments, **options)
driver.active.utils.fill_tma_descriptor = driver.active.utils.fill_tma_descriptor_tiled = lambda *given: given
driver.active.utils.on_launch = lambda *arguments: given.append(arguments)

def flat(values):
    for value in values:
        if isinstance(value, tuple | list):
            yield from flat(value)
        elif hasattr(value, "calls") or type(value).__name__ == "LazyDict":  # empty hooks, and what they would be told
            yield None
        else:
            yield value.data_ptr() if isinstance(value, torch.Tensor) else value

buffer = torch.randn(2, 3, 40)
x, y = buffer[:, :, :16], buffer[:, :, 16:32].contiguous()
vectors = [torch.randn(2, 16) for _ in range(3)]

def call(x=x):
    before = len(ordinary)
    adaln.forward(x, y, *vectors, 1e-6, False, None, torch.float32, True)
    return len(ordinary) - before

assert call() == 1 and call() == 0 and call() == 0, "a launch takes the short way from the second time on"
first, second = (list(flat(arguments)) for arguments in given[:2])
fresh = [place for place, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
assert len(fresh) <= 4, (first, second)  # x_new, out, mean and variance lie where there was room
assert {type(a) for a in first} == {type(b) for b in second}

def pairs(launch):
    # the arguments of the launches of two calls, of which the second takes the short way
    given.clear()
    launch()
    before = len(ordinary)
    launch()
    assert len(ordinary) == before, "a launch takes the short way from the second time on"
    calls = [list(flat(arguments)) for arguments in given]
    half = len(calls) // 2
    assert calls and len(calls) == 2 * half
    return zip(calls[:half], calls[half:], strict=True)

qkv, weights = torch.randn(2, 3, 48), [torch.randn(8) for _ in range(4)]
grads = [torch.randn(2, 3, 2, 8) for _ in range(3)]
x16, skip, above, folded = (torch.randn(s).bfloat16() for s in ((6, 16), (6, 16), (6, 16), (16, 32)))
hidden, rows = torch.randn(6, 32).bfloat16(), [torch.randn(6) for _ in range(4)]
sums = [torch.randn(16) for _ in range(2)]
for launch, made in (
    (lambda: long_skip_forward.forward(x16, skip, *rows[:2], folded, *sums, torch.bfloat16), 1),
    (lambda: long_skip_rows.normalise(x16, skip, *rows[:2], torch.bfloat16), 1),
    (lambda: long_skip_backward.backward_input(above, x16, skip, *rows[:2], folded, *rows[2:], want_unit=True), 3),
    (lambda: gelu.backward(hidden, hidden, True), 2),
    (lambda: qk_norm.forward(qkv, 2, *weights, None, None, 1e-5, "layer"), 2),
    (lambda: qk_norm.backward(*grads, qkv, *weights[:2], None, None, 1e-5, "layer", True, True, True), 2),
):
    for first, second in pairs(launch):
        fresh = [place for place, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
        assert len(fresh) <= made, (first, second)
        assert {type(a) for a in first} == {type(b) for b in second}

shifted = torch.zeros(241)[1:].view(2, 3, 40)[:, :, :16]
assert call(shifted) == 1 and call(shifted) == 1 and call() == 0, "other addresses are other kernels"

triton.knobs.runtime.launch_enter_hook.add(print_nothing := lambda metadata: None)
assert call() == 1, "profilers see every launch"
triton.knobs.runtime.launch_enter_hook.remove(print_nothing)
assert call() == 0
triton.__version__ = "4.0.0"
assert ordinary_launches() == "Triton 4.0 is not one of 3.6, 3.9"
vectors = [vector.bfloat16() for vector in vectors]
assert call() == 1 and call() == 1
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_the_second_launch_is_the_first_without_triton_s_python(version):
    run_compiling(SCRIPT, version)
