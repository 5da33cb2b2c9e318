"""Dispersive Loss (arXiv 2506.09027): the samples of a batch are pushed apart in the output of one block.

Nothing is added to the model and nothing is read. Published settings: a quarter of the blocks, weight 0.5, tau 0.5
(JAX, the default here); the last block, weight 0.25, tau 1 (PyTorch).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.base import Method, Term, refuse_unread
from dit_fast.models import Backbone
from dit_fast.objectives import Context
from dit_fast.ops.autocast import without_autocast
from dit_fast.options import check_choice, setting
from dit_fast.world import ranks

Variant = Literal["infonce_l2", "infonce_cosine", "hinge", "covariance"]
Scope = Literal["rank", "global"]
EPS = 1e-8  # the least norm of a sample, as in the diversity loss


def dispersive_loss(
    feature: Tensor,
    variant: Variant | str = "infonce_l2",
    tau: float = 0.5,
    margin: float = 1.0,
    scope: Scope | str = "rank",
) -> Tensor:
    """How close together the N samples of a block output [N, T, D] lie, each flattened to z_i of P = T D numbers; 0-d.

    With D_ij = |z_i - z_j|^2 / P, means over i and j including i = j unless it says i != j:

        infonce_l2       log mean exp(-D_ij / tau)                   in [-log N, 0]; 0 for identical samples
        infonce_cosine   log mean exp(cos(z_i, z_j) / tau)
        hinge            mean over i != j of max(0, margin - D_ij)^2
        covariance       sum over channels m != n of Cov_mn^2, over the samples (divisor N - 1)

    The first is the published default (Eq. 6, with the diagonal, as in the published code). The last two are written
    from secondary sources; the sum of "covariance" grows with P^2, so give it a small weight. tau: of the first two.
    scope "global": of the samples of all ranks of the default process group, of which each must have as many, and give
    the loss the same weight; gradients are those of the whole batch once the ranks' gradients are averaged.

    Computed in float32 at least, without autocast; the gradient has the feature's dtype. Distances come from the Gram
    matrix of the centred samples, so that no N x N x P differences are made: those of identical samples are 0 to about
    1e-6 of the batch's variance (float32; 1e-3 where CUDA's matrix products are set to TF32), whatever the samples have
    in common, and may be as much below 0.
    Raises UserError for a feature of another form, for one sample with "hinge" or "covariance", an unknown variant or
    scope, and a tau or margin that is not positive.
    """
    _check(feature, variant, tau, margin, scope)
    with without_autocast(feature):
        rows = feature.flatten(1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if scope == "global" and (count := ranks()) > 1:
            rows = _GatherOverRanks.apply(rows, count)
        count, width = rows.shape
        if variant in ("hinge", "covariance") and count < 2:
            raise UserError(f"dispersive loss '{variant}' is over pairs of samples, and there is only {count}")
        if variant == "infonce_cosine":
            directions = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(EPS)
            return _log_mean_exp(directions @ directions.T / tau)
        rows = rows - rows.mean(0)
        gram = rows @ rows.T
        if variant == "covariance":  # |C^T C| = |C C^T|, which is small
            return (gram.square().sum() - rows.square().sum(0).square().sum()) / (count - 1) ** 2
        squares = gram.diagonal()
        distances = (squares[:, None] + squares - 2 * gram) / width  # clamped, near ones would have no gradient
        if variant == "hinge":
            short = (margin - distances).clamp_min(0).square()
            return (short.sum() - short.diagonal().sum()) / (count * (count - 1))
        return _log_mean_exp(-distances / tau)


def _log_mean_exp(exponents: Tensor) -> Tensor:
    return exponents.flatten().logsumexp(0) - math.log(exponents.numel())


class _GatherOverRanks(torch.autograd.Function):
    """Rows [N, P] of all ranks, in their order.

    Every rank computes the same loss from them, so the mean of the ranks' gradients is the whole one if each takes
    that of its own rows times the number of ranks: the backward pass sends nothing.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: int) -> Tensor:
        ctx.ranks, ctx.own = ranks, slice(dist.get_rank() * len(rows), (dist.get_rank() + 1) * len(rows))
        parts = [torch.empty_like(rows) for _ in range(ranks)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own] * ctx.ranks, None


def _check(feature: Tensor, variant: str, tau: float, margin: float, scope: str) -> None:
    if feature.dim() < 2 or not feature.numel() or not feature.is_floating_point():
        raise UserError(
            f"dispersive loss: feature must be [N, T, D], floating point and not empty, not {list(feature.shape)} "
            f"{feature.dtype}"
        )
    check_choice("dispersive loss", variant, Variant)
    check_choice("scope", scope, Scope)
    for name, value in (("tau", tau), ("margin", margin)):
        if not 0 < value < math.inf:
            raise UserError(f"dispersive loss: {name} must be positive, not {value}")


class Dispersive(Method):
    """`dispersive_loss` of one block's output; with a class token, of all tokens, it among them."""

    name = "dispersive"
    title = "Dispersive Loss"
    about = "the samples of a batch are pushed apart in the output of one block"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Which block's output is dispersed, how, and how much it counts."""

        name: ClassVar[str] = "dispersive"
        depth: int | None = setting(
            None, "Block, from 1; none = a quarter of the blocks (JAX code; PyTorch: the last)", "[1, 1000]"
        )
        variant: Variant = setting("infonce_l2", "Form of the loss")
        weight: float = setting(0.5, "Weight of the term (JAX code; PyTorch: 0.25)", "[0, 1e6]")
        tau: float = setting(0.5, "Temperature of the InfoNCE forms (JAX code; PyTorch: 1)", "(0, 1e6]")
        margin: float = setting(1.0, "Mean squared difference from which hinge is 0", "(0, 1e6]")
        scope: Scope = setting("rank", "Samples of a rank's micro-batch (published) or of all ranks'")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        super().__init__(config, model, data)
        refuse_unread(config, "tau", "variant", "infonce_l2", "infonce_cosine")
        refuse_unread(config, "margin", "variant", "hinge")
        depth = max(1, model.depth // 4) if config.depth is None else config.depth
        self.block = model.block(depth, "methods.dispersive.depth")
        self.blocks = frozenset({self.block})

    def check_batch(self, micro_batch: int) -> None:
        """Raises ConfigError for a batch of one sample, with which no variant has a gradient."""
        config = self.config
        if micro_batch * (ranks() if config.scope == "global" else 1) < 2:
            void = "is constant" if config.variant.startswith("infonce") else "has no pair"
            fix = " or methods.dispersive.scope=global" if config.scope == "rank" and ranks() > 1 else ""
            raise ConfigError(
                f"methods.dispersive.variant={config.variant} {void} with one sample in a batch of scope "
                f"'{config.scope}'; set engine.micro_batch=2 or more{fix}"
            )

    def terms(self, context: Context) -> dict[str, Term]:
        config = self.config
        value = dispersive_loss(context.features[self.block], config.variant, config.tau, config.margin, config.scope)
        return {"dispersive/loss": Term(value, config.weight)}
