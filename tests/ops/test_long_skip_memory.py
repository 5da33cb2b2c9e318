"""What the long skip keeps for its backward pass, and the FLOPs it reports."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dit_fast.ops import long_skip
from tests.helpers.cases import loop_over
from tests.helpers.long_skip_cases import autocast, inputs


def test_flops_are_counted():
    """As for a linear layer: one GEMM [M, 2D] x [2D, D] forward, and of the backward's two what is needed."""
    for wanted in (range(6), (0,), (1, 3), (0, 4), (2,), (5,)):
        tensors = inputs((6,), 8, torch.float32)
        for index in wanted:
            tensors[index].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = long_skip(*tensors, backend="gemm")
            assert counter.get_total_flops() == 2 * 6 * 16 * 8
            y.sum().backward()
        halves = len({0, 1} & set(wanted)) + 2 * bool({2, 4} & set(wanted))
        assert counter.get_total_flops() == 2 * 6 * 16 * 8 + halves * 2 * 6 * 8 * 8


def _saved(backend, rows, width, skip_dtype):
    """Bytes that autograd keeps under bf16 autocast, each storage once, parameters left out: (all, the op's own).

    The op's own are those that the model does not hold anyway: skip is kept by the block that made it, y by the block
    that reads it (kernels.md 3.1). Sizes alone are computed, so that the shapes can be those of training.
    """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        x, skip = torch.empty(rows, width, dtype=torch.bfloat16), torch.empty(rows, width, dtype=skip_dtype)
        shapes = [(2 * width,), (2 * width,), (width, 2 * width), (width,)]
        leaves = [x, skip, *(torch.empty(shape) for shape in shapes)]
        leaves = [tensor.requires_grad_() for tensor in leaves]
        with autocast(torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
            y = long_skip(*leaves, backend=backend)

    def count(*left_out):
        skipped = {tensor.untyped_storage()._cdata for tensor in left_out}
        return sum(storage.nbytes() for key, storage in storages.items() if key not in skipped)

    return count(*leaves[2:]), count(*leaves[1:], y)


@loop_over(("rows", "width"), [(8192, 768), (8192, 1152), (65536, 1152)])
def test_memory_saved_for_the_backward_pass(rows, width):
    """At least 6 times below the released formulation: fp32 LayerNorm under bf16 autocast, x bf16, skip fp32.

    Eager: the joined fp32 row (8MD), its normalised bf16 copy (4MD), two statistics and the bf16 weight. Ours: x (2MD)
    and two numbers per row. Counting skip and y as well, which we refer to and eager does not, it is 8MD.
    """
    everything_saved, own = _saved("gemm", rows, width, torch.float32)
    eager_everything, eager = _saved("torch", rows, width, torch.float32)
    element = rows * width
    assert own == 2 * element + 8 * rows
    assert everything_saved == own + (4 + 2) * element
    assert eager == eager_everything == 12 * element + 8 * rows + 2 * 2 * width**2
    assert eager >= 6 * own
    assert _saved("gemm", rows, width, torch.bfloat16)[0] == 6 * element + 8 * rows


def test_no_copy_of_a_parameter_is_kept():
    """W', u and b' are made again: nothing of size D^2 beside the leaf itself, which an engine may have gathered."""
    tensors = [tensor.requires_grad_() for tensor in inputs((2,), 64, torch.float32)]
    kept = []
    with autocast(torch.bfloat16), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = long_skip(*tensors, backend="gemm")
    owned = [t for t in kept if not any(t.data_ptr() == leaf.data_ptr() for leaf in (*tensors, y))]
    assert sum(t.numel() for t in owned) == 2 * 2
    assert all(any(t is leaf for t in kept) for leaf in tensors[2:])


def test_parameters_may_be_away_between_the_passes():
    """As under ZeRO-3, which frees a parameter after the forward pass and gathers it again before the backward."""
    tensors = [x.requires_grad_() for x in inputs((5,), 8, torch.float32)]
    expected = torch.autograd.grad(long_skip(*tensors, backend="gemm").sum(), tensors)
    y = long_skip(*tensors, backend="gemm")
    values = [x.detach().clone() for x in tensors[2:]]
    for parameter in tensors[2:]:
        parameter.data = torch.empty(0)
    for parameter, value in zip(tensors[2:], values, strict=True):
        parameter.data = value
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), tensors), expected, strict=True))


def test_changing_what_is_saved_raises():
    for place in ("x", "skip", "y"):
        tensors = [x.bfloat16() for x in inputs((4,), 8)]
        tensors[4].requires_grad_()
        y = long_skip(*tensors, backend="gemm")
        {"x": tensors[0], "skip": tensors[1], "y": y.detach()}[place].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
