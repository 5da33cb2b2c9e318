"""Training steps without anything of ours but the model, by three habits, in our words.

*Published*: DiverseDiT (arXiv 2603.04239) and REPA share a trainer: AdamW by loops over tensors, an EMA updated
parameter by parameter, a diversity loss that waits for the device at every pair, and a weight chosen by Python
comparisons; fp16 with a loss scaler by default, the stream in half precision from the first fusion on. *Careful*: what
a good user of torch changes in it without writing a kernel: fused AdamW, a foreach EMA, the loss by one product,
compiled blocks. *diffusion-bench* (arXiv 2606.24888): fused AdamW, an EMA parameter by parameter, no clipping, and the
whole loss compiled.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_fast.benchmarks.baselines.published_diversity import published_diversity_loss, vectorised_diversity_loss
from dit_fast.data import DatasetInfo
from dit_fast.methods import Method, Term
from dit_fast.models import Backbone
from dit_fast.objectives import Context
from dit_fast.runs import OptimizerConfig
from dit_fast.train.loss import TrainingLoss


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
        return {f"{self.name}/total": self.weighted(features)}

    def weighted(self, features: list[Tensor]) -> Term:
        loss = published_diversity_loss(features).total
        weight: Tensor | float = 0.0
        if loss > 0.5:
            weight = 1.0
        elif loss > 0.1:
            weight = (loss - 0.1) / 0.5
        return Term(loss, weight)


class CarefulDiversity(PublishedDiversity):
    """The same term without a branch. loss: `vectorised_diversity_loss`, perhaps compiled."""

    name = "careful"

    def __init__(self, model: Backbone, data: DatasetInfo, loss: Callable[..., Tensor] = vectorised_diversity_loss):
        super().__init__(model, data)
        self.loss = loss

    def weighted(self, features: list[Tensor]) -> Term:
        loss = self.loss(features)
        ramp = torch.where(loss > 0.1, (loss - 0.1) / 0.5, torch.zeros_like(loss))
        return Term(loss, torch.where(loss > 0.5, torch.ones_like(loss), ramp))


class Float16Loss(TrainingLoss):
    """Its autocast is fp16."""

    autocast_dtype = torch.float16


class PlainTrainer:
    """training_loss: with one of the diversity losses above or none, on its device; `call` instead of it, such as it
    compiled. fused: torch's fused AdamW instead of its loops. foreach: the EMA by one call. A `Float16Loss` is scaled.
    mark(part): called where a part of a step ends."""

    def __init__(
        self,
        training_loss: nn.Module,
        config: OptimizerConfig,
        *,
        fused: bool = False,
        foreach: bool = False,
        call: Callable[..., tuple[Tensor, Mapping[str, Tensor]]] | None = None,
    ):
        self.training_loss, self.config, self.foreach = training_loss, config, foreach
        self.call = training_loss if call is None else call
        self.parameters: list[Tensor] = [
            parameter for parameter in training_loss.parameters() if parameter.requires_grad
        ]
        betas, how = (config.beta1, config.beta2), {"fused": True} if fused else {"foreach": True}
        self.optimizer = torch.optim.AdamW(self.parameters, config.lr, betas, config.eps, config.weight_decay, **how)
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        scaled = isinstance(training_loss, Float16Loss)
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=scaled)
        self.mark: Callable[[str], None] = lambda part: None

    def train_step(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        """One update; the loss, 0-d."""
        loss, _ = self.call(batch, step)
        self.mark("forward")
        self.scaler.scale(loss).backward()
        self.mark("backward")
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.foreach:
                torch._foreach_lerp_(self.ema, self.parameters, 1 - self.config.ema_decay)
            else:
                for average, parameter in zip(self.ema, self.parameters, strict=True):
                    average.mul_(self.config.ema_decay).add_(parameter, alpha=1 - self.config.ema_decay)
        self.mark("update")
        return loss.detach()
