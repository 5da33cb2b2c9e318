"""Every public op compiles into one graph where no gradient is wanted: sampling, frozen modules, evaluation."""

import pytest
import torch

from dit_fast import ops
from tests.helpers.golden import assert_close
from tests.helpers.op_cases import CALLS, inputs


def _randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, Y, VECTOR = _randn(2, 5, 12), _randn(2, 5, 12) + 1, _randn(2, 12)
BLOCKS = [_randn(2, 5, 12) + shift for shift in range(5)]
LONG_SKIP, MLP = ([x.float() for x in inputs(name)] for name in ("long_skip", "gelu_mlp"))
CASES = {name: (call, [x.float() for x in inputs(name)], {}) for name, call in CALLS.items()} | {
    "diversity_stats of one block": (ops.diversity_stats, [BLOCKS[:1]], {}),
    "diversity_stats of two blocks": (ops.diversity_stats, [BLOCKS[:2]], {}),
    "diversity_tap": (ops.diversity_tap, [X], {}),
    "gate_residual, statistics": (ops.gate_residual, [X, Y, VECTOR], {"return_stats": True}),
    "gelu_mlp, recompute": (ops.gelu_mlp, MLP, {"backend": "recompute"}),
    "layer_norm_modulate, statistics": (ops.layer_norm_modulate, [X, VECTOR, VECTOR], {"stats": ops.row_statistics(X)}),
    "long_skip, gemm": (ops.long_skip, LONG_SKIP, {"backend": "gemm"}),
    "row_statistics": (ops.row_statistics, [X], {}),
}


def _leaves(result):
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result if isinstance(result, tuple) else vars(result).values()
    return [leaf for part in parts for leaf in _leaves(part)]


def test_all_public_ops_are_here():
    functions = {name for name in vars(ops) if name in {call.split(",")[0].split(" ")[0] for call in CASES}}
    public = {name for name, value in vars(ops).items() if callable(value) and name[0].islower() and name[0] != "_"}
    assert functions == public, "call it in tests/helpers/op_cases.py"


@pytest.mark.parametrize("grad_enabled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_gradients(name, grad_enabled):
    op, arguments, options = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad_enabled):
        result, expected = _leaves(compiled(*arguments, **options)), _leaves(op(*arguments, **options))
    for ours, theirs in zip(result, expected, strict=True):
        assert not ours.requires_grad
        assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("wanted", [(4,), (0, 2)])
def test_compiles_where_few_blocks_want_a_gradient(wanted):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: ops.diversity_loss(x).total, fullgraph=True, backend="aot_eager")
    blocks = [block.clone().requires_grad_(index in wanted) for index, block in enumerate(BLOCKS)]
    leaves = [blocks[index] for index in wanted]
    ours = torch.autograd.grad(compiled(*blocks), leaves)
    for grad, expected in zip(ours, torch.autograd.grad(ops.diversity_loss(blocks).total, leaves), strict=True):
        assert_close(grad, expected, 1e-6)
