"""What holds for every op that torch knows."""

import pytest
import torch
from cases import loop_over

from dit_fast.ops import diversity_op, long_skip_op

F32 = torch.float32
TIMES, POSITIONS = torch.rand(4), torch.arange(4)


def new(*shape):
    return torch.randn(shape).requires_grad_()


def parameters():
    return new(16), new(16), new(8, 16), new(8)


def long_skip_backward():
    with torch.no_grad():
        saved = long_skip_op.forward_op(new(5, 8), new(5, 8), *parameters(), [None] * 4, 1e-6, F32, "gemm")
    saved = [x.requires_grad_() for x in saved]
    return new(5, 8), *saved, new(5, 8), new(5, 8), *parameters(), "gemm", [True] * 6


def diversity_backward():
    with torch.no_grad():
        norms = diversity_op.forward_op([new(6, 8), new(6, 8)], False, "auto")[2]
    return [new(6, 8), new(6, 8)], norms.requires_grad_(), new(3, 2, 8), new(2, 2), [], [0, 1], "auto"


STREAM, VECTOR, MODULATED = (2, 3, 8), (2, 8), ("gate_residual_modulate", "auto")
ARGUMENTS = {
    "adaln_forward": lambda: (
        new(*STREAM), new(*STREAM), new(*VECTOR), new(*VECTOR), new(*VECTOR), None, None, 1e-6, F32, True, *MODULATED
    ),
    "adaln_backward": lambda: (
        *(new(*STREAM) for _ in range(4)), new(*VECTOR), new(*VECTOR), new(2, 3), torch.ones(2, 3).requires_grad_(),
        1e-6, F32, F32, F32, F32, *MODULATED,
    ),
    "diversity_forward": lambda: ([new(6, 8), new(6, 8)], True, "auto"),
    "diversity_backward": diversity_backward,
    "flow_noised": lambda: (new(4, 8), TIMES, POSITIONS, 3, "linear", "auto"),
    "flow_error": lambda: (new(4, 8), new(4, 8), TIMES, POSITIONS, 3, "linear", "auto"),
    "flow_error_backward": lambda: (
        new(4), new(4, 8), new(4, 8), TIMES, POSITIONS, 3, "linear", [True, True], "auto"
    ),
    "gelu_backward": lambda: (new(5, 8), new(5, 8), True, True, "recompute"),
    "long_skip_forward": lambda: (new(5, 8), new(5, 8), *parameters(), [None] * 4, 1e-6, F32, "gemm"),
    "long_skip_backward": long_skip_backward,
    "qk_norm_forward": lambda: (new(2, 3, 24), 2, *(new(4) for _ in range(4)), 1e-5, "auto"),
    "qk_norm_backward": lambda: (
        *(new(2, 3, 2, 4) for _ in range(3)), new(2, 3, 24), new(4), new(4), 1e-5, True, True, "auto"
    ),
    "repa_cosine_forward": lambda: (new(5, 8), new(5, 8), "auto"),
    "repa_cosine_backward": lambda: (new(), new(5, 8), new(5, 8), new(3, 5), [True, True], "auto"),
    "row_statistics": lambda: (new(5, 8), "auto"),
}  # fmt: skip


def test_all_ops_are_here():
    names = {name.removeprefix("dit_fast::") for name in torch._C._dispatch_get_all_op_names() if "dit_fast::" in name}
    assert names == set(ARGUMENTS)


@loop_over("name", ARGUMENTS)
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_opcheck_with_inputs_that_need_a_gradient(name):
    torch.library.opcheck(getattr(torch.ops.dit_fast, name).default, ARGUMENTS[name]())
