"""DiverseDiT (arXiv 2603.04239): blocks are pushed to differ, with a weight that follows the loss itself.

Paper and published code disagree on the pairs, the variant of the terms and whether the weight is differentiated; each
is an option. Defaults: the published pairs and terms, and the weight as a weight (detached), as the paper means it.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dit_fast import philox
from dit_fast.data import DatasetInfo
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.base import Logged, Method, Panel, Term, refuse_unread
from dit_fast.models import Backbone
from dit_fast.objectives import Context
from dit_fast.ops import DiversityTaps
from dit_fast.options import setting

POLICIES = ("release", "anchor", "random_layers", "all")
RELEASE_PAIRS = 10  # fixed in the published loop, which also starts from it
LAYER_STREAM = philox.Stream.METHOD


def adaptive_weight(
    loss: Tensor,
    low: float = 0.1,
    high: float = 0.5,
    form: Literal["paper", "continuous"] = "paper",
    detach: bool = True,
) -> Tensor:
    """Weight of the diversity loss, 0-d, as a function of the loss itself (0-d).

    "paper" (Sec. 3.2, and the code): 1 above `high`, (loss - low) / high above `low`, else 0; it jumps at `high`.
    "continuous": clip((loss - low) / (high - low), 0, 1). detach=False lets gradients flow through the weight, as in
    the published trainer. That of a NaN is NaN, as is `diversity_loss` of features with one; the published code takes
    both for 0, which hides a training that diverges. Raises UserError for an unknown form or unless 0 <= low < high <
    infinity.
    """
    if form not in ("paper", "continuous"):
        raise UserError(f"unknown form '{form}' of the adaptive weight; valid: paper, continuous")
    if not 0 <= low < high < math.inf:
        raise UserError(f"the adaptive weight needs finite 0 <= low < high, not low={low}, high={high}")
    loss = loss.detach() if detach else loss
    if form == "continuous":
        return ((loss - low) / (high - low)).clamp(0, 1)
    ramp = torch.where(loss <= low, torch.zeros_like(loss), (loss - low) / high)  # NaN is not below
    return torch.where(loss > high, torch.ones_like(loss), ramp)


def select_pairs(
    policy: str, num_blocks: int, encoder_depth: int | None = None, k: int = 10, seed: int = 0, step: int = 0
) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of blocks counted from 0. encoder_depth: aligned block counted from 1; None: no projection.
    Only the first two policies depend on it.

    "release": the published loop. With m = min(10, all pairs) it takes the first m of i = m - e - 1, ..., m + e - 1 and
    j = i + 1, ..., L - 1; without projection i starts at 0. "anchor": the aligned block (block 0 without projection)
    and k others, following ones first. "random_layers": all pairs among k blocks drawn anew for each (seed, step).
    Raises ConfigError for an unknown policy, and where "release" would count from the last block backwards (the
    published code then pairs wrong blocks) or finds no pair. Where there is one block, no policy has a pair.
    """
    if num_blocks < 2:
        raise ConfigError(
            "diversedit compares blocks, and the model has one; take it out of methods, or set model.depth=2"
        )
    blocks = range(num_blocks)
    everything = [(i, j) for i in blocks for j in blocks if i < j]
    if policy == "all":
        return everything
    if policy not in POLICIES:
        raise ConfigError(f"unknown pair policy '{policy}'; valid: {', '.join(POLICIES)}")
    if encoder_depth is not None and not 1 <= encoder_depth <= num_blocks:
        raise ConfigError(f"encoder_depth={encoder_depth} is not one of the blocks 1..{num_blocks}")
    if k < 1 + (policy == "random_layers"):
        raise ConfigError(f"k={k} gives no pair with policy '{policy}'; raise it")
    if policy == "random_layers":
        words = philox.uint32_numpy(seed, np.array([step]), LAYER_STREAM, num_blocks)[0]
        kept = set(np.argsort(words, kind="stable")[:k].tolist())
        return [(i, j) for i, j in everything if i in kept and j in kept]
    if policy == "anchor":
        anchor = 0 if encoder_depth is None else encoder_depth - 1
        others = [*range(anchor + 1, num_blocks), *range(anchor - 1, -1, -1)][:k]
        return sorted((min(anchor, other), max(anchor, other)) for other in others)
    limit = min(RELEASE_PAIRS, len(everything))
    outer = blocks if encoder_depth is None else range(limit - encoder_depth - 1, limit + encoder_depth)
    if outer.start < 0:
        raise ConfigError(
            f"pairs 'release' with encoder_depth={encoder_depth} starts at block {outer.start}; "
            f"use encoder_depth <= {limit - 1} or another policy"
        )
    pairs = [(i, j) for i in outer for j in range(i + 1, num_blocks)][:limit]
    if not pairs:
        raise ConfigError(
            f"pairs 'release' finds none for {num_blocks} blocks and encoder_depth={encoder_depth}; use 'all'"
        )
    return pairs


class DiverseDiT(Method):
    """The diversity loss with its adaptive weight. The long skips are the model's (`skip_wiring`).

    The pairs are worked out once; those of "random_layers" at each step, alike on all ranks.
    """

    name = "diversedit"
    title = "DiverseDiT"
    about = "a diversity loss keeps the blocks from doing the same work"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Pairs, terms and weight of the diversity loss."""

        name: ClassVar[str] = "diversedit"
        pairs: Literal["release", "anchor", "random_layers", "all"] = setting("release", "Which pairs of blocks")
        k: int = setting(
            10, "Blocks beside the anchor (anchor) or drawn anew each step (random_layers); at most all", "[1, 1000]"
        )
        encoder_depth: int | None = setting(
            None, "Block aligned by REPA, from 1; it only steers the pairs of release and anchor", "[1, 1000]"
        )
        variant: Literal["release", "paper"] = setting("release", "Terms as in the published code or as in the paper")
        weight: Literal["paper", "continuous", "constant"] = setting("paper", "How the weight follows the loss")
        weight_constant: float = setting(1e-3, "weight=constant; the value of the authors' later branch", "[0, 1e6]")
        detach_weight: bool = setting(True, "No gradient through the weight")
        low: float = setting(0.1, "Loss below which the weight is 0", "[0, 1e6]")
        high: float = setting(0.5, "Loss above which the weight is 1", "(0, 1e6]")
        scope: Literal["rank", "global"] = setting("rank", "Statistics of a rank's micro-batch or of all ranks'")

        def __post_init__(self) -> None:
            if self.weight != "constant" and not self.low < self.high:
                raise ConfigError(f"diversedit needs low < high, not low={self.low}, high={self.high}")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Reads all blocks, or only those in the pairs where nothing else counts (variant "paper", pairs that stay)."""
        super().__init__(config, model, data)
        refuse_unread(config, "k", "pairs", "random_layers", "anchor")
        refuse_unread(config, "weight_constant", "weight", "constant")
        refuse_unread(config, "detach_weight", "weight", "paper", "continuous")
        self.depth, self.redrawn = model.depth, config.pairs == "random_layers"
        pairs = self._pairs(0, 0)
        few = config.variant == "paper" and not self.redrawn
        order = sorted({block for pair in pairs for block in pair}) if few else list(range(self.depth))
        self.blocks = frozenset(order)
        self.pairs = [(order.index(i), order.index(j)) for i, j in pairs]  # of the tapped blocks

    def collector(self) -> DiversityTaps:
        return DiversityTaps()

    def kind(self, number: int) -> Hashable:
        return number if self.redrawn and self.active(number) else self.active(number)

    @classmethod
    def panel(cls, config: Mapping[str, Any], logged: Logged) -> Panel | None:
        steps, weight = logged.column("diversedit/weight")
        if not len(weight):
            return None
        share, acting = float(np.mean(weight > 0)), "never acted"
        if share > 0:
            top = int(np.argmax(weight))
            acting = f"acted in {share:.0%} of the logged steps, most at step {steps[top]:,} ({weight[top]:.2g})"
        terms = ("total", "orthogonality", "mutual_information", "dispersion")
        adaptive = config["weight"] != "constant"
        return Panel(
            "Diversity between blocks",
            [
                "The diversity loss adds up how parallel the blocks' mean features are (orthogonality), how alike "
                "their tokens are (mutual information) and how evenly channels are used (dispersion). Its weight is "
                "adaptive: it acts while blocks are too alike and lets go when they differ enough.",
                f"Here the weight ({config['weight']}) {acting}; the loss over the last tenth of the run was "
                f"{logged.final('diversedit/total'):.3f}.",
            ],
            {term.replace("_", " "): f"diversedit/{term}" for term in terms},
            weight="diversedit/weight",
            limits={config["low"]: "weight > 0", config["high"]: "weight = 1"} if adaptive else {},
        )

    def terms(self, context: Context) -> dict[str, Term]:
        taps: Any = context.taps.collectors[self.name]
        pairs = self._pairs(context.key.seed, context.number) if self.redrawn else self.pairs
        loss = taps.loss(pairs, self.config.variant, self.config.scope)
        weight = self._weight(loss.total)
        logs = {
            "diversedit/orthogonality": loss.orthogonality,
            "diversedit/mutual_information": loss.mutual_information,
            "diversedit/dispersion": loss.dispersion,
            "diversedit/weight": weight,
        }
        return {"diversedit/total": Term(loss.total, weight, {name: value.detach() for name, value in logs.items()})}

    def _pairs(self, seed: int, step: int) -> list[tuple[int, int]]:
        return select_pairs(self.config.pairs, self.depth, self.config.encoder_depth, self.config.k, seed, step)

    def _weight(self, loss: Tensor) -> Tensor:
        config = self.config
        if config.weight == "constant":
            return torch.full_like(loss, config.weight_constant)
        return adaptive_weight(loss, config.low, config.high, config.weight, config.detach_weight)
