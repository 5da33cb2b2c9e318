"""Every public op compiles into one graph where no gradient is wanted: sampling, frozen modules, evaluation."""

import pytest
import torch

from dit_fast import ops
from tests.helpers.golden import assert_close


def _randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, Y, VECTOR, POSITIONS, TIMES = _randn(2, 5, 12), _randn(2, 5, 12) + 1, _randn(2, 12), torch.tensor([3, 8]), _randn(2)
BLOCKS = [_randn(2, 5, 12) + shift for shift in range(5)]
HEAD = [_randn(4), _randn(4) + 1, _randn(4) + 2, _randn(4) + 3]

CALLS = {
    "diversity_stats": (ops.diversity_stats, [BLOCKS], {}),
    "diversity_stats of one block": (ops.diversity_stats, [BLOCKS[:1]], {}),
    "diversity_stats of two blocks": (ops.diversity_stats, [BLOCKS[:2]], {}),
    "diversity_loss": (lambda *x: ops.diversity_loss(x).total, BLOCKS, {}),
    "diversity_tap": (ops.diversity_tap, [X], {}),
    "flow_noised": (ops.flow_noised, [X, TIMES.sigmoid(), POSITIONS, 7], {}),
    "flow_error": (ops.flow_error, [X, Y, TIMES.sigmoid(), POSITIONS, 7], {}),
    "gate_residual": (ops.gate_residual, [X, Y, VECTOR], {}),
    "gate_residual, statistics": (ops.gate_residual, [X, Y, VECTOR], {"return_stats": True}),
    "gate_residual_modulate": (ops.gate_residual_modulate, [X, Y, VECTOR, VECTOR, VECTOR], {}),
    "gelu_mlp": (ops.gelu_mlp, [X, _randn(20, 12), _randn(20), _randn(12, 20), _randn(12)], {}),
    "gelu_mlp, recompute": (
        ops.gelu_mlp, [X, _randn(20, 12), _randn(20), _randn(12, 20), _randn(12)], {"backend": "recompute"},
    ),
    "layer_norm_modulate": (ops.layer_norm_modulate, [X, VECTOR, VECTOR], {}),
    "layer_norm_modulate, statistics": (ops.layer_norm_modulate, [X, VECTOR, VECTOR], {"stats": ops.row_statistics(X)}),
    "long_skip": (ops.long_skip, [X, Y, _randn(24), _randn(24), _randn(12, 24), _randn(12)], {}),
    "long_skip, gemm": (
        ops.long_skip, [X, Y, _randn(24), _randn(24), _randn(12, 24), _randn(12)], {"backend": "gemm"},
    ),
    "qk_norm": (ops.qk_norm, [X, 1, *HEAD], {}),
    "repa_cosine": (ops.repa_cosine, [X, Y], {}),
    "row_statistics": (ops.row_statistics, [X], {}),
}  # fmt: skip


def _leaves(result):
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result if isinstance(result, tuple) else vars(result).values()
    return [leaf for part in parts for leaf in _leaves(part)]


def test_all_public_ops_are_here():
    functions = {name for name in vars(ops) if name in {call.split(",")[0].split(" ")[0] for call in CALLS}}
    public = {name for name, value in vars(ops).items() if callable(value) and name[0].islower() and name[0] != "_"}
    assert functions == public


@pytest.mark.parametrize("grad_enabled", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_gradients(name, grad_enabled):
    op, arguments, options = CALLS[name]
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
