"""What the diversity loss adds to the gradient of each tapped block in one backward pass; see diversity_taps.py.

On CUDA one launch per block, which is also the backward of the gate that wrote the block where there is one; elsewhere
the gradient of `diversity_op`, and the gate's own after it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast.ops._op import rows
from dit_fast.ops._register import define, goes_straight
from dit_fast.ops.diversity_op import EPS, backward_op
from dit_fast.ops.linear import PartialSums


def _partners(
    features: list[Tensor], grad_pair_sums: Tensor, mix: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    if backend == "triton":
        from dit_fast.kernels import diversity_taps as kernel

        found = kernel.partners(features, grad_pair_sums, mix)
        addresses, strides = found.rows
        # New tensors: a table is that of other calls, too, and an op's results belong to its caller.
        return found.weights, found.sources, addresses.detach(), strides.detach(), found.aligned
    weights, sources, addresses, strides, _ = _fake_partners(features, grad_pair_sums, mix, backend)
    diagonal = torch.eye(len(features), dtype=torch.bool, device=weights.device)
    pairs = (grad_pair_sums + grad_pair_sums.T).to(weights.dtype)
    common = _most_frequent(pairs)[:, None] if mix else pairs.new_zeros(len(features), 1)
    left = pairs - common
    own = left.diagonal()[:, None].clone()
    # The partners that are left come first, in the order of their numbers; what follows is not read.
    absent = (left == 0) | diagonal
    order = absent.to(torch.int8).argsort(dim=1, stable=True)
    weights.copy_(torch.cat([common, own, left.gather(1, order)[:, :-1]], 1))
    sources.copy_(torch.cat([(~absent).sum(1, keepdim=True), order[:, :-1]], 1))
    return weights, sources, addresses.zero_(), strides.zero_(), True


def _fake_partners(
    features: list[Tensor], grad_pair_sums: Tensor, mix: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    new, blocks = grad_pair_sums.new_empty, len(features)
    weights, sources = new((blocks, blocks + 1), dtype=torch.float32), new((blocks, blocks), dtype=torch.int32)
    return weights, sources, new(blocks, dtype=torch.int64), new(blocks, dtype=torch.int64), True


partners_op = define(
    "diversity_partners(Tensor[] features, Tensor grad_pair_sums, bool mix, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, bool)",
    _partners,
    _fake_partners,
)


def _most_frequent(pairs: Tensor) -> Tensor:
    """[K], in each row of [K, K] beside the diagonal; the smallest of equally frequent ones."""
    count = len(pairs)
    return pairs.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1).mode(dim=1).values


def _tap_backward(
    features: list[Tensor], x: Tensor, above: Tensor | None, y: Tensor | None, gate: Tensor | None, block: int,
    weights: Tensor, sources: Tensor, addresses: Tensor, strides: Tensor, aligned: bool, inverse_norms: Tensor,
    grad_statistics: Tensor, mixture: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    empty = x.new_empty(0)
    if backend == "triton":
        from dit_fast.kernels import diversity_taps as kernel

        above, y, gate = (None if each is None else rows(each) for each in (above, y, gate))
        shared = kernel.Partners(weights, sources, (addresses, strides), aligned)
        known = (inverse_norms, grad_statistics, mixture, tuple(feature.dtype for feature in features))
        grad_x, grad_y, grad_gate = kernel.backward(rows(x), above, y, gate, block, shared, *known)
        return grad_x, empty if grad_y is None else grad_y, empty if grad_gate is None else grad_gate
    places = torch.arange(len(features) - 1, dtype=torch.int64, device=x.device)
    listed = torch.where(places < sources[block, 0], sources[block, 1:].long(), len(features))
    left = weights.new_zeros(len(features) + 1, dtype=weights.dtype).scatter_(0, listed, weights[block, 2:])[:-1]
    directions = torch.stack(features).to(inverse_norms.dtype) * inverse_norms[:, :, None]
    flat, inverse, own = x.flatten(0, 1).to(inverse_norms.dtype), inverse_norms[block, :, None], directions[block]
    mixed = torch.tensordot(left, directions, 1) + weights[block, 1] * own
    mixed = mixed if mixture is None else mixed + weights[block, 0] * mixture
    along = torch.where(inverse < 1 / EPS, (mixed * own).sum(1, keepdim=True), 0)
    sums, abs_sums, square_sums = grad_statistics[:, block]
    total = sums + abs_sums * flat.sign() + 2 * square_sums * flat + inverse * (mixed - along * own)
    total = total.view(x.shape) if above is None else total.view(x.shape) + above
    if y is None or gate is None:
        return total.to(x.dtype), empty, empty
    return total.to(x.dtype), (total * gate[:, None]).to(y.dtype), (total * y).sum(1).to(gate.dtype)


def _fake_tap_backward(
    features: list[Tensor], x: Tensor, above: Tensor | None, y: Tensor | None, gate: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    like = lambda each: x.new_empty(0 if each is None else each.shape, dtype=(x if each is None else each).dtype)  # noqa: E731
    return like(x), like(y), like(gate)


tap_backward_op = define(
    "diversity_tap_backward(Tensor[] features, Tensor x, Tensor? above, Tensor? y, Tensor? gate, int block, "
    "Tensor weights, Tensor sources, Tensor addresses, Tensor strides, bool aligned, Tensor inverse_norms, "
    "Tensor grad_statistics, Tensor? mixture, str backend) -> (Tensor, Tensor, Tensor)",
    _tap_backward,
    _fake_tap_backward,
)


class Descent:
    """One backward pass of the taps: made when the statistics' gradients are known, used once for each block.

    features: of all blocks, [N, T, D]; mixture: without rows where none was kept.
    """

    def __init__(
        self, backend: str, features: Sequence[Tensor], inverse_norms: Tensor, mixture: Tensor,
        grad_statistics: Tensor, grad_pair_sums: Tensor,
    ):  # fmt: skip
        self.task = torch._C._current_graph_task_id()
        self.backend, self.features = backend, features
        # Those of blocks with odd strides are copies; addresses of them stay valid as long as this object.
        self._rows = [rows(x.flatten(0, 1)) for x in features]
        self._norms, self._statistics = inverse_norms, grad_statistics
        self._mixture, self._sources = mixture, self._rows
        if backend == "triton":
            found = partners_op(self._rows, grad_pair_sums, bool(len(mixture)), backend)
            kept = mixture if len(mixture) else None
            self._shared = (*found, inverse_norms, grad_statistics.float().contiguous(), kept, backend)
            self._straight = goes_straight([self._rows, *self._shared])
            self._dtypes = tuple(feature.dtype for feature in features)
        elif len(mixture):
            self._sources, self._norms, self._statistics, self._pairs = through_mixture(
                self._rows, inverse_norms, mixture, grad_statistics, grad_pair_sums
            )
        else:
            self._pairs = [grad_pair_sums] * len(self._rows)

    def added(self, block: int, above: Tensor | None) -> Tensor:
        """The gradient of a block's output, `above` being what comes from the layers above."""
        x = self.features[block]
        if self.backend == "triton":
            return self._launch(x, above, None, None, block)[0]
        upstream = [] if above is None else [above.flatten(0, 1)]
        incoming = (self._norms, self._statistics, self._pairs[block])
        (grad,) = backward_op(self._sources, *incoming, upstream, [block], self.backend)
        return grad.view(x.shape)

    def through_gate(
        self, block: int, above: Tensor | None, y: Tensor, gate: Tensor, home: tuple[PartialSums, int] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of stream, branch and gate behind which the block's output is x + gate * y; "triton" alone.

        home: where that of the gate may be left as partial sums, with its number there; it is None then.
        """
        x = self.features[block]
        if home is None or not (self._straight and goes_straight((x, above, y, gate))):
            return self._launch(x, above, y, gate, block)
        from dit_fast.kernels import diversity_taps as kernel

        given = (None if each is None else rows(each) for each in (x, above, y, gate))
        weights, sources, addresses, strides, aligned, *known, _ = self._shared
        shared = kernel.Partners(weights, sources, (addresses, strides), aligned)
        grad_x, grad_y, partials = kernel.differentiate(*given, block, shared, *known, self._dtypes)
        home[0].leave(home[1], partials)
        return grad_x, grad_y, None

    def _launch(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        # What all blocks share was looked at once: K times K tensors.
        run = tap_backward_op.run if self._straight and goes_straight(given) else tap_backward_op
        return run(self._rows, *given, *self._shared)


def through_mixture(
    sources: list[Tensor], inverse_norms: Tensor, mixture: Tensor, grad_statistics: Tensor, grad_pair_sums: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Sequence[Tensor]]:
    """The mixture as one more source, of norm one, and for each block its weights towards all sources."""
    count, index = len(sources), torch.arange(len(sources), dtype=torch.int64, device=mixture.device)
    weights = grad_pair_sums + grad_pair_sums.T
    common = _most_frequent(weights)
    # Of block k's matrix only row k matters; the op adds the transpose, hence half of what stands on the diagonal.
    per_block = weights.new_zeros(count, count + 1, count + 1)
    per_block[index, index, :-1] = weights - common[:, None]
    per_block[index, index, index] = common / -2
    per_block[index, index, -1] = common
    norms = torch.cat([inverse_norms, inverse_norms.new_ones(1, inverse_norms.shape[1])])
    statistics = torch.cat([grad_statistics, grad_statistics.new_zeros(3, 1, grad_statistics.shape[2])], 1)
    return [*sources, mixture], norms, statistics, per_block.unbind(0)
