"""The third call of a traced function has the first one's bits, without its Python; only what holds for every call of a
kind is taken down. "Kernels" here move memory by address, as those of Triton would."""

import contextlib
import ctypes
import weakref
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_fast import kernels
from dit_fast.ops import traced as module
from dit_fast.ops._kinds import Kinds
from dit_fast.ops.linear import joined_sum_op
from dit_fast.ops.traced import traced
from tests.helpers.triton_scripts import run_compiling
from tests.ops.install_triton import VERSIONS


class Launches:
    """What `kernels/launch.py` is to traced functions."""

    def __init__(self):
        self.note, self.direct, self.hooks = None, 0, False

    @contextlib.contextmanager
    def listening(self, note):
        self.note = note
        yield
        self.note = None

    def hooked(self):
        return self.hooks

    def copy(self, source, target):
        """Of 16 floats; both contiguous."""

        def launch(x, y, z, stream, function, addresses):
            self.direct += 1
            assert (x, y, z, stream, function) == (1, 2, 3, 7, None)
            ctypes.memmove(addresses[1], addresses[0], int(16 * addresses[2]))

        around = {"sizes": (1, 2, 3), "stream": lambda device: 7 + device, "device": 0, "middle": (None,)}
        direct = SimpleNamespace(launch=launch, **around, rest=(4.0,), in_a_tuple=True)
        if self.note is not None:
            self.note(None if source.data_ptr() % 16 else self.copy, direct, (source, target))
        ctypes.memmove(target.data_ptr(), source.data_ptr(), 64)


@pytest.fixture
def launches(monkeypatch):
    stand_in = Launches()
    monkeypatch.setattr(kernels, "launch", stand_in, raising=False)
    monkeypatch.setattr(module, "_PROGRAMS", Kinds())
    return stand_in


def calls_of(function, *given, facts=(), times=4):
    """The results of some calls, and how many of them ran the function."""
    ran = []

    def counted(*arguments):
        ran.append(1)
        return function(*arguments)

    return [traced(counted, facts, *given) for _ in range(times)], len(ran)


def refusals():
    return [program for _, program in module._PROGRAMS.items() if isinstance(program, str)]


def half(x, weight, nothing, bias):
    assert nothing is None
    rows = x.transpose(0, 1).reshape(-1, x.shape[-1])
    made = torch.addmm(bias, rows, weight.t())
    made.add_(1).mul_(rows[:, :1])
    first, second = made.to(torch.float64).chunk(2, 1)
    return torch.stack([first, second]).sum(0), made.view(x.shape[1], x.shape[0], -1)[1:], None, x.view(-1)


def test_the_third_call_is_the_first_without_its_python(launches):
    x, weight, bias = torch.randn(3, 5, 6), torch.randn(8, 6), torch.randn(8)
    results, ran = calls_of(half, x, weight, None, bias)
    assert ran == 2
    assert not refusals()
    for made in results[1:]:
        for ours, first in zip(made, results[0], strict=True):
            assert (ours is None) == (first is None)
            assert ours is None or (torch.equal(ours, first) and ours.stride() == first.stride())
    assert results[-1][3].data_ptr() == x.data_ptr()


def test_arguments_of_another_kind_are_another_function(launches):
    ran = []

    def shape_matters(x):
        ran.append(1)
        return (x.reshape(-1) + x.shape[0],)

    for x in (torch.randn(2, 3), torch.randn(3, 2), torch.randn(3, 2).t(), torch.randn(2, 3).double()):
        for number in range(3):
            fresh = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x * number)
            (made,) = traced(shape_matters, (), fresh)
            assert torch.equal(made, fresh.reshape(-1) + len(fresh))
    assert len(ran) == 2 * 4
    assert torch.equal(traced(lambda add, x: (x + add,), (1,), x)[0], x + 1)


def test_an_empty_tensor_is_made_in_the_shape_of_a_view_of_all_of_it(launches):
    def copied(form, x):
        made = torch.empty(1, 16)
        launches.copy(x, made)
        return torch.as_strided(made, *form), made.view(16)[4:]

    x = torch.randn(16)
    for form, views in ((((4, 4), (1, 4)), 1), (((4, 4), (1, 1)), 2), (((15,), (1,)), 2)):
        results, _ = calls_of(copied, x, facts=(form,))
        assert programs()[-1].__doc__.count("part(") == views
        for made, first in zip(results[-1], results[0], strict=True):
            assert torch.equal(made, first)
            assert made.stride() == first.stride()


def test_one_tensor_in_two_places_is_not_taken_down(launches):
    """Next time they may be two."""
    x, y = torch.randn(3), torch.randn(3)
    for first, second in ((x, x), (x, x), (x, x), (x, y), (x, y), (x, x)):
        assert torch.equal(traced(difference, (), first, second)[0], first - second)


def programs():
    return [program for _, program in module._PROGRAMS.items() if callable(program)]


def test_an_odd_address_is_not_taken_down(launches):
    """It may have been copied for its sake."""
    odd, even = torch.randn(49)[1:].view(3, 16), torch.randn(3, 16)
    for x, taken in ((odd, 0), (odd, 0), (even, 1), (even, 1)):
        assert torch.equal(traced(moved, (launches,), x)[1], x[1])
        assert len(programs()) == taken


def test_what_a_mode_of_functions_changes_is_not_taken_down(launches):
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return 2 * result if func is torch.exp else result

    def exponential(x):
        return (torch.exp(x),)

    x = torch.randn(3)
    with Doubled():
        for _ in range(3):
            assert torch.equal(traced(exponential, (), x)[0], 2 * x.exp())
    for taken in (1, 1):
        with torch.device("cpu"):  # a mode as well, which changes nothing here
            assert torch.equal(traced(exponential, (), x)[0], x.exp())
        assert len(programs()) == taken


def test_one_thread_at_a_time_listens(launches):
    found = []

    def second(x):
        return (x + 1,)

    def first(x):
        thread = Thread(target=lambda: found.extend(traced(second, (), x)[0] for _ in range(3)))
        thread.start()
        thread.join()
        return (x * 2,)

    x = torch.randn(3)
    traced(first, (), x)
    module._PROGRAMS = Kinds()
    for _ in range(2):
        assert torch.equal(traced(first, (), x)[0], x * 2)
    assert all(torch.equal(each, x + 1) for each in found)
    assert not refusals()


def difference(x, y):
    return (x - y,)


def test_an_argument_may_lie_anywhere_in_its_memory(launches):
    buffer = torch.randn(100)
    for start in (0, 4, 48, 7):
        (made,) = traced(last_row, (), buffer[start : start + 12].view(3, 4))
        assert torch.equal(made, buffer[start + 8 : start + 12] * 2)
    assert not refusals()


def last_row(x):
    return (x[2:].mul(2)[0],)


def moved(launches, x):
    out, again = torch.empty(40), torch.empty_like(x)
    launches.copy(x[1], out[8:24])
    launches.copy(out[8:24], again[0])
    return out[8:24], again[0]


def test_kernels_get_the_addresses_of_this_call(launches):
    for number in range(5):
        x = torch.randn(3, 16)
        made = traced(moved, (launches,), x)
        assert all(torch.equal(each, x[1]) for each in made)
        assert launches.direct == 2 * max(0, number - 1)


def test_an_odd_address_runs_the_function(launches):
    """And so does every call while something hangs on launches."""
    for _ in range(3):
        traced(moved, (launches,), torch.randn(3, 16))
    before = launches.direct
    x = torch.randn(49)[1:].view(3, 16)
    assert torch.equal(traced(moved, (launches,), x)[1], x[1])
    launches.hooks = True
    traced(moved, (launches,), torch.randn(3, 16))
    assert launches.direct == before


def test_what_is_told_is_looked_at(launches):
    """Hooks on saved tensors give a backward tensors of strides of their own."""

    def by_strides(x):
        return (x.contiguous() if x.stride(0) == 1 else x.clone(),)

    x = torch.randn(4, 5)
    for made in (x, x, x, x.t().contiguous().t(), x.double()):
        assert torch.equal(traced(by_strides, (), made)[0], made)


OUTSIDE = torch.randn(3)


def reads_outside(x):
    return (x + OUTSIDE,)


def looks_at_values(x):
    return (x * (1 if x.sum() > 0 else -1),)


def calls_an_op_of_ours(x):
    return (joined_sum_op([x], "torch")[1],)


def reads_as_another_dtype(x):
    return (x.view(torch.int32) + 1,)


def launches_without_a_launcher(x):
    kernels.launch.note and kernels.launch.note(None, None, ())
    return (x + 1,)


def launches_on_an_odd_place(x):
    out = torch.empty(64)
    kernels.launch.copy(x.view(-1)[:16], out[1:17])
    return (out[1:17],)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (reads_outside, "a tensor that it was not given"),
        (looks_at_values, "calls aten"),
        (calls_an_op_of_ours, "calls dit_fast"),
        (reads_as_another_dtype, "another dtype"),
        (launches_without_a_launcher, "without a launcher"),
        (launches_on_an_odd_place, "no multiple of 16"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_cannot_be_taken_down_runs_as_it_is(function, reason, launches, caplog):
    for number in range(4):
        x = torch.randn(7, 3) if number % 2 else -torch.randn(7, 3).abs()
        assert torch.equal(traced(function, (), x)[0], function(x)[0])
    (refusal,) = refusals()
    assert reason in refusal
    assert [record.getMessage() for record in caplog.records] == [
        f"{function.__qualname__} keeps its Python, which takes longer: {refusal}"
    ]


def test_autocast_has_its_say_once(launches):
    """What it cast is written down; what ran outside of it stays in fp32."""

    def products(x, weight):
        with torch.autocast("cpu", enabled=False):
            exact = x @ weight
        return exact, x @ weight

    x, weight = torch.randn(4, 4), torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        results, ran = calls_of(products, x, weight)
    assert ran == 2
    assert [each.dtype for each in results[-1]] == [torch.float32, torch.bfloat16]
    assert all(map(torch.equal, results[-1], results[0]))


def test_quick_functions_reach_the_operators_that_they_stand_for():
    """With arguments as the dispatcher hands them out; products of another dtype are CUDA's alone."""
    seen, aten = [], torch.ops.aten

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        a, bias = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((4, 4), 4))
        given = {
            aten.addmm.default: ((bias, a, a), {}),
            aten.cat.default: (([a, a], 1), {}),
            aten.gelu.default: ((a,), {"approximate": "tanh"}),
            aten.mm.default: ((a, a), {}),
            aten.mm.dtype: ((a, a, torch.float32), {}),
            aten.sum.dim_IntList: ((a, [0]), {"dtype": torch.float32}),
        }
        assert given.keys() == module._QUICK.keys()
        for func, (args, kwargs) in given.items():
            with Look():
                module._QUICK[func](*args, **kwargs)
            assert [each for each in seen if each.namespace == "aten"] == [func]
            seen.clear()


def test_nothing_lives_longer_for_being_taken_down(launches):
    alive = []

    def chain(x):
        first = x @ x
        gone = weakref.ref(first)
        second = first + 1
        del first
        alive.append(gone() is not None)
        return (second,)

    calls_of(chain, torch.randn(4, 4))
    assert alive == [False, False]


def test_nothing_lives_longer_than_it_is_read(launches):
    def chain(x):
        first = x @ x
        second = (first.t() + 1).exp()
        return (second.sum(0),)

    x = torch.randn(4, 4)
    calls_of(chain, x, times=2)
    alive, made = [], []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            alive.append(sum(each() is not None for each in made))
            made.append(weakref.ref(result))
            return result

    for _ in range(2):
        traced(chain, (), x)
    with Look():
        traced(chain, (), x)
    assert len(made) == 5, "mm, t, add, exp, sum"
    assert max(alive) <= 2, alive


SCRIPT = """
from dit_fast.benchmarks import null_driver
null_driver.install()
from triton.runtime import driver
from dit_fast.benchmarks.host import _Ours
from dit_fast.ops import traced

side, steps = _Ours(6), []
for number in range(6):
    given = []
    driver.active.utils.on_launch = lambda *arguments: given.append(arguments)
    side.run(4 * number)
    steps.append(given)

def flat(values):
    for value in values:
        if isinstance(value, tuple | list):
            yield from flat(value)
        elif not hasattr(value, "calls") and type(value).__name__ not in ("LazyDict", "NoneType"):
            yield "an address" if hasattr(value, "data_ptr") or isinstance(value, int) and value > 1 << 32 else value

programs = [program for _, program in traced._PROGRAMS.items()]
assert sum(map(callable, programs)) > 12 and not any(isinstance(each, str) for each in programs), programs
first, last = ([list(flat(arguments)) for arguments in steps[number]] for number in (1, 5))
assert len(first) > 80, len(first)
assert first == last, [pair for pair in zip(first, last) if pair[0] != pair[1]][:3]
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_launches_what_it_launched_before_it_was_taken_down(version):
    run_compiling(SCRIPT, version)
