"""A training step with the habits of the published trainer, in our words, on our model.

DiverseDiT (arXiv 2603.04239) and REPA share this trainer: AdamW by loops over tensors, an EMA updated parameter by
parameter, a diversity loss that waits for the device at every pair, and a weight chosen by Python comparisons.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_fast.benchmarks.baselines.published_diversity import published_diversity_loss
from dit_fast.data import DatasetInfo
from dit_fast.methods import Method, Term
from dit_fast.models import Backbone
from dit_fast.objectives import Context
from dit_fast.runs import OptimizerConfig


class PublishedDiversity(Method):
    """The published loss with its weight: 1 above 0.5, (loss - 0.1) / 0.5 above 0.1, else 0, and differentiated."""

    name = "published"

    @dataclass(frozen=True)
    class Config:
        name: ClassVar[str] = "published"

    def __init__(self, model: Backbone, data: DatasetInfo):
        self.blocks = frozenset(range(model.depth))

    def terms(self, context: Context) -> dict[str, Term]:
        features = [context.features[block] for block in sorted(context.features)]
        loss = published_diversity_loss(features).total
        weight: Tensor | float = 0.0
        if loss > 0.5:
            weight = 1.0
        elif loss > 0.1:
            weight = (loss - 0.1) / 0.5
        return {"published/total": Term(loss, weight)}


class PublishedTrainer:
    """training_loss: with PublishedDiversity, on its device."""

    def __init__(self, training_loss: nn.Module, config: OptimizerConfig):
        self.training_loss, self.config = training_loss, config
        self.parameters = [parameter for parameter in training_loss.parameters() if parameter.requires_grad]
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, betas, config.eps, config.weight_decay, foreach=True
        )
        self.ema = [parameter.detach().clone() for parameter in self.parameters]

    def train_step(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        """One update; the loss, 0-d."""
        loss, _ = self.training_loss(batch, step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.mul_(self.config.ema_decay).add_(parameter, alpha=1 - self.config.ema_decay)
        return loss.detach()
