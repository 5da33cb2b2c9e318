"""An op that is called again is the list of what its kernels' launches were: the bits of its Python."""

import importlib
import pkgutil

import pytest
import torch

from dit_fast import ops
from dit_fast.ops import traced
from dit_fast.ops._kinds import Kinds
from tests.helpers.op_cases import REGISTERED, new

BACKENDS = ("torch", "gemm", "recompute")  # of the cases


def calls():
    """By name, what calls a registered op whose tensors come first."""
    modules = [importlib.import_module(f"dit_fast.ops.{each.name}") for each in pkgutil.iter_modules(ops.__path__)]
    values = [value for module in modules for value in vars(module).values()]
    found = {value.registered.name(): value for value in values if hasattr(value, "registered")}
    return {name.removeprefix("dit_fast::"): call for name, call in found.items() if "traced" in call.__qualname__}


CALLS = calls()


def given(name):
    return tuple("triton" if type(each) is str and each in BACKENDS else each for each in REGISTERED[name]())


def flat(results):
    return [each.clone() for each in ([results] if isinstance(results, torch.Tensor) else results)]


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    kinds = Kinds()
    monkeypatch.setattr(traced, "_PROGRAMS", kinds)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # traces do not fill
    return lambda: [found for _, found in kinds.items() if callable(found)]


@pytest.mark.parametrize("name", CALLS)
def test_an_op_that_is_called_again(name, programs):
    call = CALLS[name]
    for time in range(4):
        arguments = given(name)
        with torch.no_grad():
            found, expected = flat(call(*arguments)), flat(call.run(*arguments))
        assert len(programs()) == (time > 0)
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert torch.equal(one, other)


def test_what_an_op_is_told_makes_another_trace(programs):
    call, *tensors = CALLS["qk_norm_forward"], new(2, 3, 24), *[None] * 6
    for heads in (2, 2, 4, 4):
        with torch.no_grad():
            found, expected = (
                call(*tensors, heads, 1e-6, "none", "triton"),
                call.run(*tensors, heads, 1e-6, "none", "triton"),
            )
        assert all(map(torch.equal, found, expected))
    assert len(programs()) == 2


def test_a_tensor_that_does_not_lie_plain_is_the_dispatchers(programs, caplog):
    call, x = CALLS["row_statistics"], torch.randn(5, 8)
    for odd in (x, x, torch._neg_view(x), torch._neg_view(x), torch._neg_view(x), x):
        found, expected = call(odd, "triton"), call.run(odd.clone(), "triton")
        assert all(map(torch.equal, found, expected))
    assert len(programs()) == 1
    assert not caplog.records, "nobody tried to take it down"


def test_a_traced_op_is_seen_by_the_profiler(programs):
    call, x = CALLS["row_statistics"], torch.randn(5, 8)
    for _ in range(3):
        call(x, "triton")
    assert len(programs()) == 1
    with torch.autograd.profiler.profile() as seen:
        call(x, "triton")
    assert "dit_fast::row_statistics" in {event.name for event in seen.function_events}
