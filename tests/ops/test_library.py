"""What holds for every op that torch knows."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dit_fast import _C, ops, philox
from dit_fast.ops import _register
from dit_fast.ops.row_statistics import row_statistics_op
from tests.helpers.cases import loop_over
from tests.helpers.op_cases import FUSED, REFERENCES, REGISTERED, inputs

needs_library = pytest.mark.skipif(_C.unavailable() is not None, reason=f"{_C.unavailable()}")


def test_importing_the_ops_registers_them_all():
    """In a process of its own: others may have imported more."""
    names = "[name for name in torch._C._dispatch_get_all_op_names() if name.startswith('dit_fast::')]"
    command = [sys.executable, "-c", f"import torch, dit_fast.ops; print(*{names})"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {name.removeprefix("dit_fast::") for name in found} == set(REGISTERED), (
        "call it in tests/helpers/op_cases.py"
    )


@loop_over("name", REGISTERED)
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_opcheck_with_inputs_that_need_a_gradient(name):
    torch.library.opcheck(getattr(torch.ops.dit_fast, name).default, REGISTERED[name]())


def test_every_op_runs_on_the_device_of_its_tensors(monkeypatch):
    """Kernels go to the current device, whatever their arguments: each op makes it that of its first tensor."""
    asked, entered = [], []

    class Guard(torch.cuda.device_of):
        def __init__(self, tensor):
            entered.append(tensor)
            super().__init__(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(_register, "is_elsewhere", lambda tensor: asked.append(tensor) or True)
    for name, arguments in REGISTERED.items():
        arguments, asked[:], entered[:] = arguments(), [], []
        with torch.no_grad():
            getattr(torch.ops.dit_fast, name)(*arguments)
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        assert [tensor.data_ptr() for tensor in entered] == [first.data_ptr()] == [x.data_ptr() for x in asked], name


def test_a_device_is_only_entered_where_it_is_not_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    tensors = [SimpleNamespace(get_device=lambda index=index: index) for index in (-1, 0, 1)]
    assert [_register.is_elsewhere(tensor) for tensor in tensors] == [False, True, False]


def test_an_op_is_seen_by_all_who_look_for_it():
    """Without them the implementation is called and not the op."""
    x = torch.randn(5, 8)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    seen = []
    with Seen():
        row_statistics_op(x, "torch")
    assert seen[0] == "row_statistics"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        row_statistics_op(x, "torch")
    assert "dit_fast::row_statistics" in {event.name for event in record.events()}
    fake = FakeTensorMode().from_tensor(x)
    assert type(row_statistics_op(fake, "torch")[0]) is FakeTensor
    assert "dit_fast.row_statistics" in str(make_fx(lambda x: row_statistics_op(x, "torch"))(x).code)
    assert not _register.goes_straight([[fake], 1])
    assert _register.goes_straight([[x, torch.nn.Parameter(x)], 1, None])


@needs_library
def test_a_batch_of_gradients_goes_through_the_dispatcher():
    x, shift, scale = (x.float().requires_grad_() for x in inputs("layer_norm_modulate"))
    batch = torch.randn(3, *x.shape)
    out = ops.layer_norm_modulate(x, shift, scale, backend="cpp")
    expected = [torch.autograd.grad(out, x, each, retain_graph=True)[0] for each in batch]
    (found,) = torch.autograd.grad(out, x, batch, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_tensor_that_is_not_what_lies_in_its_memory_goes_through_the_dispatcher():
    """Kernels take its address."""
    x = torch.randn(5, 8)
    with torch.inference_mode():
        plain = [x, x.T, x[1:], torch.nn.Parameter(x), torch.randn(3)]
    assert all(_register.goes_straight([each, [each]]) for each in plain)
    for odd in (torch._neg_view(x), torch._efficientzerotensor((5, 8)), torch.empty(5, 8, device="meta")):
        assert not _register.goes_straight([odd])
        assert not _register.goes_straight([[x, odd]])


# Backwards of nodes that run only where nobody looks on, in autograd's thread of the tensors' device.
STRAIGHT = {"diversity_descent.through_gate", "linear._joined_gradients"}
LISTENING = {"traced.run"}  # to what others launch
PARTS = {"long_skip_rows.project"}  # of one registered implementation


def test_kernels_are_launched_inside_ops_alone():
    """Nothing but an op's implementation calls a launcher; elsewhere a module of kernels only says what it supports."""
    root = Path(ops.__file__).parents[1]
    loose = []
    trees = {path: ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
    registered = {
        name if "." in (name := ast.unparse(argument)) else f"{path.stem}.{name}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "define"
        for argument in node.args
    }
    for path, tree in trees.items():
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            body = ast.unparse(function)
            imports = re.search(r"from dit_fast\.kernels import (\w+)(?: as (\w+))?", body)
            if imports and f"{path.stem}.{function.name}" not in registered | STRAIGHT | LISTENING | PARTS:
                used = set(re.findall(rf"\b{imports[2] or imports[1]}\.(\w+)", body))
                loose += [f"{path.name}:{function.name} {name}" for name in used - {"supports"}]
        launches = re.search(r"dit_fast\.kernels import (?!tuning\b)", path.read_text())  # a table, no kernel
        assert path.parent.name in ("ops", "kernels") or not launches, path
    assert not loose


def with_statistics(*tensors):
    x_new, stats = ops.gate_residual(*tensors, backend="cpp", return_stats=True)
    return torch.cat([x.flatten() for x in (x_new, *stats)])


CPP = {
    "layer_norm_modulate": lambda *x: ops.layer_norm_modulate(*x, backend="cpp"),
    "gate_residual": with_statistics,
    "diversity_loss": lambda *x: ops.diversity_loss(x, backend="cpp").total,
}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_no_bit(default):
    def everything():
        results = [philox.normal(3, torch.arange(5), 0, (7,)), philox.uniform(3, torch.arange(5), 1, (7,))]
        for table in (REFERENCES, FUSED, CPP):
            for name, op in table.items():
                tensors = [x.float().requires_grad_() for x in inputs(name)]
                results.append(op(*tensors))
                results += torch.autograd.grad(results[-1].square().sum(), tensors)
        return results

    expected = everything()
    torch.set_default_dtype(default)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, same) and ours.dtype == same.dtype for ours, same in zip(found, expected, strict=True))
