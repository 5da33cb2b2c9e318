"""Taps: the gradient of the diversity loss becomes part of each block's own backward.

A tap is the identity on a block's output. In the backward the node of the graph that wrote the output, `gate_residual`,
receives the gradient from the layers above and adds the loss's gradient to it before it goes on. A block that something
else wrote gets a node of its own, which receives one gradient and writes the other.

    forward   block 0 -> tap 0 -> block 1 -> tap 1 -> ...
              statistics = f(outputs of gates, and tokens of the other taps), in one pass over all the features
    backward  the statistics' gradients first (autograd runs a node after all its consumers), then block by block

A node joined this way adds what was prepared in the same backward pass only, and so do taps, whose 0-d token has a
gradient then.

"triton" makes the loss's gradients of all blocks as soon as the statistics' are known, in launches that take the
same time whatever the cosines are, and each is let go as soon as its tap has used it: K blocks of memory at the start
of a backward, falling as it goes on. A gate adds its block's in its own launch. On a CPU, where a block's gradient is
made when its tap asks for it, the loss costs no gradient tensors of its own: with H the symmetric weights of the pairs'
gradient, a tap needs V_k = sum over l of H_kl u_l, one row per partner. So where a block has many partners, the forward
also keeps the mixture X = sum of all u_l, [M, D] in float32, and with c_k the most frequent weight of block k

    V_k = c_k X + sum over l of (H_kl - c_k) u_l.

With all pairs and mean cosines of one sign only k's own residual weight is not zero; a cosine of the other sign costs
one row more. About half of a trained model's cosines have the other sign, so that a GPU, which waits for these rows and
not for the arithmetic, is slower that way.

Put taps outside of activation checkpoints: a recomputed block must not register its output twice.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from dit_fast.errors import UserError
from dit_fast.ops import diversity_op
from dit_fast.ops._op import differentiable, require_tensor
from dit_fast.ops.diversity import (
    SENT,
    DiversityLoss,
    DiversityStats,
    Sums,
    check_features,
    check_options,
    loss_from_sums,
    sums_of,
)
from dit_fast.ops.diversity_descent import Descent
from dit_fast.ops.diversity_op import OP, forward_op
from dit_fast.ops.row_statistics import RowStatistics

_INSTEAD = 'diversity_loss(outputs, backend="torch")'
FEW = 3  # blocks that a tap reads one by one; for more, and for most, the mixture of all directions is kept


class Shared:
    """State shared by the taps of one forward pass. `features` are detached and live until they are summed."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.mix = False
        self.features: list[Tensor] = []
        self.joined: set[int] = set()  # blocks whose gradient the node of a gate gives
        self.tangents: dict[int, tuple[Tensor, Tensor]] = {}  # feature and tangent, both with their graph
        self.waiting = 0  # blocks that have not used it
        self.descent: Descent | None = None

    def used(self) -> Descent:
        """What this backward prepared; forgotten with the last block."""
        descent = self.descent
        assert descent is not None
        self.waiting -= 1
        if not self.waiting:
            self.descent = None
        return descent


class Joint:
    """A tap on the result of a gate, kept by that gate's node in the graph, whose backward asks it."""

    def __init__(self, shared: Shared, index: int):
        self._shared, self._index = shared, index

    @property
    def active(self) -> bool:
        """Whether the statistics' gradients take part in the backward pass that runs."""
        descent = self._shared.descent
        return descent is not None and descent.task == torch._C._current_graph_task_id()

    def parts(self, above: Tensor | None, backend: str) -> tuple[Tensor | None, Tensor | None]:
        """What the loss adds to the gradient of the gate's result, for the one launch that has the gate's with it, and
        that gradient `above`; elsewhere None and their sum."""
        descent = self._shared.used()
        if descent.backend == backend == "triton" and above is not None:
            return descent.of(self._index), above
        return None, descent.added(self._index, above)


class Tap(torch.autograd.Function):
    """(shared, x [N, T, D]) -> x, token."""

    @staticmethod
    def forward(shared: Shared, x: Tensor) -> tuple[Tensor, Tensor]:
        shared.features.append(x.detach())
        return x.view_as(x), x.new_empty(())  # nobody reads a token

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.shared = inputs[0]
        ctx.index = len(ctx.shared.features) - 1
        ctx.save_for_backward(inputs[1])  # what the gradient depends on: a second derivative meets the refusal
        ctx.save_for_forward(inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, token: Tensor | None) -> tuple[None, Tensor | None]:
        if token is None:
            return None, upstream
        return None, ctx.shared.used().added(ctx.index, upstream)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shared.tangents[ctx.index] = (ctx.saved_tensors[0], tangent)
        return tangent.view_as(tangent), tangent.new_zeros(())


_tap = differentiable(Tap, "DiversityTaps", _INSTEAD)


class Collect(torch.autograd.Function):
    """(shared, *tokens) -> statistics [3, K, D], pair_sums [K, K], inverse_norms, what is kept of the tapped features.

    The token of a block that a gate wrote is that output: the statistics depend on it, and no gradient is sent.
    """

    @staticmethod
    def forward(shared: Shared, *tokens: Tensor) -> tuple[Tensor, ...]:
        rows = [x.flatten(0, 1) for x in shared.features]
        return forward_op(rows, shared.mix, shared.backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.shared = inputs[0]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # else autograd would fill zeros of what is kept
        ctx.save_for_backward(*output[2:], *ctx.shared.features)
        ctx.save_for_forward(*ctx.shared.features)

    @staticmethod
    def backward(
        ctx: Any, grad_statistics: Tensor | None, grad_pair_sums: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        inverse_norms, kept, *features = ctx.saved_tensors
        grads = diversity_op.with_zeros(grad_statistics, grad_pair_sums, inverse_norms, features)
        shared, needed = ctx.shared, ctx.needs_input_grad[1:]
        wanted = [index for index, tapped in enumerate(needed) if tapped]
        shared.descent = Descent(shared.backend, features, inverse_norms, kept, *grads, wanted)
        shared.waiting = len(wanted)
        token = features[0].new_zeros(())
        sent = [tapped and index not in shared.joined for index, tapped in enumerate(needed)]
        return None, *(token.to(x.dtype) if own else None for x, own in zip(features, sent, strict=True))

    @staticmethod
    def jvp(ctx: Any, _: None, *tokens: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # They hold the graph, whose taps hold what they lie in.
        known, ctx.shared.tangents = ctx.shared.tangents, {}
        pairs = [known.get(index, (feature, None)) for index, feature in enumerate(ctx.saved_tensors)]
        rows = [feature.flatten(0, 1) for feature, _ in pairs]
        changes = [None if change is None else change.flatten(0, 1) for _, change in pairs]
        return *diversity_op.tangent(rows, changes), None, None


_collect = differentiable(Collect, "DiversityTaps", _INSTEAD)


def _gate_of(x: Tensor) -> Any:
    """The node of the gate that wrote x and takes the loss's gradient, if x is its result as it is; else None.

    Not where there are tangents or torch.func's levels. A branch or gate that needs a gradient is what a second
    derivative meets the refusal by.
    """
    if torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return None
    node = x.grad_fn
    if getattr(node, "tap", x) is not None or x.output_nr or not any(node.needs_input_grad[1:3]):  # type: ignore[union-attr]
        return None
    return None if unpack_dual(x).tangent is not None else node


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
        self._sums: Sums | None = None
        self._stats: DiversityStats | None = None
        self._count = 0

    def tap(self, x: Tensor, stats: RowStatistics | None = None) -> Tensor:
        """Registers a block's output [N, T, D] and returns it. Raises UserError once the statistics were taken.

        stats: what a model hands to every collector; not used.
        """
        if self._sums is not None:
            raise UserError("these taps were already summed; make new DiversityTaps for each forward pass")
        require_tensor("diversity_tap", "x", x)
        self._count += 1
        if torch.compiler.is_compiling():
            self._outputs.append(x)
            return x
        shared, gate = self._shared, _gate_of(x)
        if gate is not None:
            gate.tap = Joint(shared, len(shared.features))
            shared.joined.add(len(shared.features))
            shared.features.append(x.detach())
            self._tokens.append(x)
            return x
        same, token = _tap(shared, x)
        self._tokens.append(token)
        return same

    def stats(self) -> DiversityStats:
        """Statistics of all outputs tapped so far, in one pass, computed once. Raises UserError if shapes differ."""
        self._stats = self._stats or self._sum(len(self._tokens) - 1).named()
        return self._stats

    def _sum(self, most_joined: int) -> Sums:
        """most_joined: the largest number of blocks that one block's gradient will depend on."""
        shared = self._shared
        if self._sums is None and self._outputs:
            self._sums = sums_of(self._outputs, shared.backend)
            self._outputs = []
        elif self._sums is None:
            check_features(shared.features)
            count = shared.features[0][..., 0].numel()
            # Else the most frequent weight is zero: nothing would be read of the mixture.
            useful = most_joined > FEW and 2 * most_joined > len(shared.features) - 1
            shared.backend = OP.choose(shared.backend, shared.features[0].device, *shared.features)
            wanted = shared.backend != "triton" and any(token.requires_grad for token in self._tokens)
            shared.mix = useful and wanted
            sums, pair_sums, *_ = _collect(shared, *self._tokens)
            self._sums = Sums(shared.backend, sums, pair_sums, count)
            self._tokens, shared.features = [], []
        return self._sums

    def loss(
        self,
        pairs: Literal["all"] | Sequence[tuple[int, int]] = "all",
        variant: Literal["release", "paper"] = "release",
        scope: Literal["rank", "global"] = "rank",
    ) -> DiversityLoss:
        """`diversity_loss` of the tapped outputs; same arguments, values, gradients and errors."""
        chosen = check_options(pairs, self._count, variant, scope)
        most = 0 if self._outputs else _most_joined(chosen)
        return loss_from_sums(self._sum(most), chosen, variant, scope)


@lru_cache(SENT)
def _most_joined(pairs: tuple[tuple[int, int], ...]) -> int:
    joined = Counter(block for pair in pairs for block in set(pair))
    return max((0, *joined.values()))


def diversity_tap(x: Tensor, backend: str = "auto") -> tuple[Tensor, DiversityStats]:
    """Identity on one block's features [N, T, D] that hands out their statistics (K = 1).

    Whatever gradient the statistics receive is added to x's own in one pass of the backward. `pair_sums` [1, 1] carries
    no gradient: a token's cosine with itself is constant. For statistics between blocks: `DiversityTaps`.
    """
    taps = DiversityTaps(backend)
    return taps.tap(x), taps.stats()
