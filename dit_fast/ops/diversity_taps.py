"""Taps: the gradient of the diversity loss becomes part of each block's own backward.

A tap is the identity on a block's output. In the backward it receives the gradient from the layers above and writes
that plus the loss's gradient in one pass, so that the loss costs no gradient tensors of its own and no additions.

    forward   block 0 -> tap 0 -> block 1 -> tap 1 -> ...          each tap also hands out a token, a 0-d tensor
              statistics = f(tokens), computed in one pass over all the features
    backward  the statistics' gradients first (autograd runs a node after all its consumers), then block by block

With H the symmetric weights of the pairs' gradient, a tap needs V_k = sum over l of H_kl u_l: one row per partner, and
for all pairs K rows in each of K taps. So where a block has many partners, the forward also keeps the mixture X = sum
of all u_l, [M, D] in float32, and with c_k the most frequent weight of block k

    V_k = c_k X + sum over l of (H_kl - c_k) u_l.

With all pairs and mean cosines of one sign only k's own residual weight is not zero: a tap reads its block, the
mixture and the gradient from above, however many blocks there are. A cosine of the other sign costs one row more.

Put taps outside of activation checkpoints: a recomputed block must not register its output twice.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops import diversity_op
from dit_fast.ops._op import differentiable, require_tensor
from dit_fast.ops.diversity import (
    DiversityLoss,
    DiversityStats,
    check_features,
    check_options,
    diversity_stats,
    known_rows,
    loss_from_stats,
    stats_from_sums,
)
from dit_fast.ops.diversity_op import OP, backward_op, forward_op
from dit_fast.ops.row_statistics import RowStatistics

_INSTEAD = 'diversity_loss(outputs, backend="torch")'
FEW = 3  # blocks that a tap reads one by one; for more, the mixture of all directions is kept


class Shared:
    """State shared by the taps of one forward pass. `features` are detached and live until they are summed."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.mix = False
        self.features: list[Tensor] = []
        self.known: diversity_op.Known | None = None
        self.tangents: dict[int, tuple[Tensor, Tensor]] = {}  # feature and tangent, both with their graph
        self.waiting = 0
        # Rows of all sources, their inverse norms, gradient of the statistics, and of the pair sums for each block.
        self.gradients: tuple[list[Tensor], Tensor, Tensor, Sequence[Tensor]] | tuple[()] = ()


class Tap(torch.autograd.Function):
    """(shared, x [N, T, D]) -> x, token."""

    @staticmethod
    def forward(shared: Shared, x: Tensor) -> tuple[Tensor, Tensor]:
        shared.features.append(x.detach())
        return x.view_as(x), x.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.shared, ctx.shape = inputs[0], inputs[1].shape
        ctx.index = len(ctx.shared.features) - 1
        ctx.save_for_backward(inputs[1])  # what the gradient depends on: a second derivative meets the refusal
        ctx.save_for_forward(inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, token: Tensor | None) -> tuple[None, Tensor | None]:
        if token is None:
            return None, upstream
        shared = ctx.shared
        rows, inverse_norms, grad_statistics, grad_pair_sums = shared.gradients
        above = [] if upstream is None else [upstream.flatten(0, 1)]
        incoming = (inverse_norms, grad_statistics, grad_pair_sums[ctx.index])
        (grad,) = backward_op(rows, *incoming, above, [ctx.index], shared.backend)
        shared.waiting -= 1
        if not shared.waiting:
            shared.gradients = ()
        return None, grad.view(ctx.shape)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shared.tangents[ctx.index] = (ctx.saved_tensors[0], tangent)
        return tangent.view_as(tangent), tangent.new_zeros(())


_tap = differentiable(Tap, "DiversityTaps", _INSTEAD)


class Collect(torch.autograd.Function):
    """(shared, *tokens) -> statistics [3, K, D], pair_sums [K, K], inverse_norms, mixture of the tapped features."""

    @staticmethod
    def forward(shared: Shared, *tokens: Tensor) -> tuple[Tensor, ...]:
        rows = [x.flatten(0, 1) for x in shared.features]
        return forward_op(rows, shared.mix, shared.backend, *(shared.known or ()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.shared = inputs[0]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # else autograd would fill zeros of the mixture's size
        ctx.save_for_backward(*output[2:], *ctx.shared.features)
        ctx.save_for_forward(*ctx.shared.features)

    @staticmethod
    def backward(
        ctx: Any, grad_statistics: Tensor | None, grad_pair_sums: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        inverse_norms, mixture, *features = ctx.saved_tensors
        grads = diversity_op.with_zeros(grad_statistics, grad_pair_sums, inverse_norms, features)
        rows = [x.flatten(0, 1) for x in features]
        if len(mixture):
            ctx.shared.gradients = _through_mixture(rows, inverse_norms, mixture, *grads)
        else:
            ctx.shared.gradients = (rows, inverse_norms, grads[0], [grads[1]] * len(rows))
        needed = ctx.needs_input_grad[1:]
        ctx.shared.waiting = sum(needed)
        return None, *(x.new_zeros(()) if tapped else None for x, tapped in zip(features, needed, strict=True))

    @staticmethod
    def jvp(ctx: Any, _: None, *tokens: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # They hold the graph, whose taps hold what they lie in.
        known, ctx.shared.tangents = ctx.shared.tangents, {}
        pairs = [known.get(index, (feature, None)) for index, feature in enumerate(ctx.saved_tensors)]
        rows = [feature.flatten(0, 1) for feature, _ in pairs]
        changes = [None if change is None else change.flatten(0, 1) for _, change in pairs]
        return *diversity_op.tangent(rows, changes), None, None


_collect = differentiable(Collect, "DiversityTaps", _INSTEAD)


def _through_mixture(
    rows: list[Tensor], inverse_norms: Tensor, mixture: Tensor, grad_statistics: Tensor, grad_pair_sums: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Sequence[Tensor]]:
    """The mixture as one more source, of norm one, and for each block its weights towards all sources."""
    count, index = len(rows), torch.arange(len(rows), dtype=torch.int64, device=mixture.device)
    weights = grad_pair_sums + grad_pair_sums.T
    partners = weights.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)
    common = partners.mode(dim=1).values
    # Of block k's matrix only row k matters; the op adds the transpose, hence half of what stands on the diagonal.
    per_block = weights.new_zeros(count, count + 1, count + 1)
    per_block[index, index, :-1] = weights - common[:, None]
    per_block[index, index, index] = common / -2
    per_block[index, index, -1] = common
    norms = torch.cat([inverse_norms, inverse_norms.new_ones(1, inverse_norms.shape[1])])
    statistics = torch.cat([grad_statistics, grad_statistics.new_zeros(3, 1, grad_statistics.shape[2])], 1)
    return [*rows, mixture], norms, statistics, per_block.unbind(0)


class DiversityTaps:
    """Collects block outputs during one forward pass; make a new one for each.

        taps = DiversityTaps()
        for block in blocks:
            x = taps.tap(block(x))          # use what it returns, nowhere the tensor given to it
        loss = taps.loss("all").total       # same values and gradients as diversity_loss of the outputs

    backend: as for `diversity_loss`. Blocks count from 0 in the order in which they were tapped. Under torch.compile
    the outputs are only remembered: a compiled graph adds the gradients itself.
    """

    def __init__(self, backend: str = "auto"):
        OP.check(backend)
        self._shared = Shared(backend)
        self._outputs: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._known: list[RowStatistics | None] = []
        self._stats: DiversityStats | None = None
        self._count = 0

    def tap(self, x: Tensor, stats: RowStatistics | None = None) -> Tensor:
        """Registers a block's output [N, T, D] and returns it. Raises UserError once the statistics were taken.

        stats: x's row statistics where its producer knows them, as for `diversity_stats`, which names what is wrong
        with them when the statistics are taken. Not used under torch.compile.
        """
        if self._stats is not None:
            raise UserError("these taps were already summed; make new DiversityTaps for each forward pass")
        require_tensor("diversity_tap", "x", x)
        self._count += 1
        if torch.compiler.is_compiling():
            self._outputs.append(x)
            return x
        same, token = _tap(self._shared, x)
        self._known.append(stats)
        self._tokens.append(token)
        return same

    def stats(self) -> DiversityStats:
        """Statistics of all outputs tapped so far, in one pass, computed once. Raises UserError if shapes differ."""
        return self._sum(len(self._tokens) - 1)

    def _sum(self, most_joined: int) -> DiversityStats:
        """most_joined: the largest number of blocks that one block's gradient will depend on."""
        shared = self._shared
        if self._stats is None and self._outputs:
            self._stats = diversity_stats(self._outputs, shared.backend)
            self._outputs = []
        elif self._stats is None:
            check_features(shared.features)
            count = shared.features[0][..., 0].numel()
            shared.mix = most_joined > FEW and any(token.requires_grad for token in self._tokens)
            shared.known = known_rows(shared.features, self._known)
            shared.backend = OP.choose(shared.backend, shared.features[0].device, *shared.features)
            sums, pair_sums, *_ = _collect(shared, *self._tokens)
            self._stats = stats_from_sums(sums, pair_sums, count)
            self._tokens, self._known, shared.features, shared.known = [], [], [], None
        return self._stats

    def loss(
        self,
        pairs: Literal["all"] | Sequence[tuple[int, int]] = "all",
        variant: Literal["release", "paper"] = "release",
        scope: Literal["rank", "global"] = "rank",
    ) -> DiversityLoss:
        """`diversity_loss` of the tapped outputs; same arguments, values, gradients and errors."""
        chosen = check_options(pairs, self._count, variant, scope)
        joined = [sum(block in pair for pair in chosen) for block in range(self._count)]
        return loss_from_stats(self._sum(max(joined, default=0)), chosen, variant, scope)


def diversity_tap(x: Tensor, backend: str = "auto") -> tuple[Tensor, DiversityStats]:
    """Identity on one block's features [N, T, D] that hands out their statistics (K = 1).

    Whatever gradient the statistics receive is added to x's own in one pass of the backward. `pair_sums` [1, 1] carries
    no gradient: a token's cosine with itself is constant. For statistics between blocks: `DiversityTaps`.
    """
    taps = DiversityTaps(backend)
    return taps.tap(x), taps.stats()
