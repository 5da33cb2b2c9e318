"""What the diversity loss adds to the gradient of each tapped block in one backward pass; see diversity_taps.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_fast.ops._op import rows, wide
from dit_fast.ops._register import define
from dit_fast.ops.diversity_op import backward_op


def _tap_backward(
    added: Tensor, above: Tensor, y: Tensor, gate: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        from dit_fast.kernels import diversity_taps as kernel

        return kernel.backward(added.contiguous(), rows(above), rows(y), rows(gate))
    dtype = wide(added)
    total = added.to(dtype) + above.to(dtype)
    grad_y, grad_gate = total * gate.to(dtype)[:, None], (total * y.to(dtype)).sum(1)
    return total.to(added.dtype), grad_y.to(y.dtype), grad_gate.to(gate.dtype)


def _fake_tap_backward(
    added: Tensor, above: Tensor, y: Tensor, gate: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return added.new_empty(added.shape), y.new_empty(y.shape), gate.new_empty(gate.shape)


tap_backward_op = define(
    "diversity_tap_backward(Tensor added, Tensor above, Tensor y, Tensor gate, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _tap_backward,
    _fake_tap_backward,
)


def through_gate(added: Tensor, above: Tensor, y: Tensor, gate: Tensor, at_home: bool) -> tuple[Tensor, ...]:
    """Gradients of stream, branch and gate of x + gate * y, whose own gradient is added + above; at home partial sums
    of the gate's. "triton" alone, where nobody looks on."""
    from dit_fast.kernels import diversity_taps as kernel

    return (kernel.differentiate if at_home else kernel.backward)(added, rows(above), rows(y), rows(gate))


class Descent:
    """One backward pass of the taps: made when the statistics' gradients are known, used once for each block.

    features: of all blocks, [N, T, D]; kept: by the forward; wanted: the blocks that will ask.
    """

    def __init__(
        self, backend: str, features: Sequence[Tensor], inverse_norms: Tensor, kept: Tensor,
        grad_statistics: Tensor, grad_pair_sums: Tensor, wanted: list[int],
    ):  # fmt: skip
        self.task = torch._C._current_graph_task_id()
        self.backend, self._shape = backend, features[0].shape
        # Those of blocks with odd strides are copies.
        sources = [rows(x.flatten(0, 1)) for x in features]
        if backend == "triton":
            grads = backward_op(sources, inverse_norms, kept, grad_statistics, grad_pair_sums, [], wanted, backend)
            self._made = dict(zip(wanted, grads, strict=True))
        elif len(kept):
            self._known = through_mixture(sources, inverse_norms, kept, grad_statistics, grad_pair_sums)
        else:
            self._known = sources, inverse_norms, grad_statistics, [grad_pair_sums] * len(sources)

    def of(self, block: int) -> Tensor:
        """What the loss adds to the gradient of a block's output; "triton" alone, which forgets it then."""
        return self._made.pop(block).view(self._shape)

    def added(self, block: int, above: Tensor | None) -> Tensor:
        """The gradient of a block's output, `above` being what comes from the layers above."""
        if self.backend == "triton":
            return self.of(block) if above is None else self.of(block) + above
        upstream = [] if above is None else [above.flatten(0, 1)]
        sources, norms, statistics, pairs = self._known
        (grad,) = backward_op(sources, norms, None, statistics, pairs[block], upstream, [block], self.backend)
        return grad.view(self._shape)


def through_mixture(
    sources: list[Tensor], inverse_norms: Tensor, mixture: Tensor, grad_statistics: Tensor, grad_pair_sums: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Sequence[Tensor]]:
    """The mixture as one more source, of norm one, and for each block its weights towards all sources.

    Of the most frequent weight of a block towards others nothing is left; of equally frequent ones the smallest counts.
    """
    count, index = len(sources), torch.arange(len(sources), dtype=torch.int64, device=mixture.device)
    weights = grad_pair_sums + grad_pair_sums.T
    beside = weights.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)  # the diagonal
    common = beside.mode(dim=1).values
    # Of block k's matrix only row k matters; the op adds the transpose, hence half of what stands on the diagonal.
    per_block = weights.new_zeros(count, count + 1, count + 1)
    per_block[index, index, :-1] = weights - common[:, None]
    per_block[index, index, index] = common / -2
    per_block[index, index, -1] = common
    norms = torch.cat([inverse_norms, inverse_norms.new_ones(1, inverse_norms.shape[1])])
    statistics = torch.cat([grad_statistics, grad_statistics.new_zeros(3, 1, grad_statistics.shape[2])], 1)
    return [*sources, mixture], norms, statistics, per_block.unbind(0)
