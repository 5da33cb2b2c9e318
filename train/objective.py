"""From a micro-batch of latent moments to the summed loss: flow matching plus the terms of the configured methods.

Every random number is keyed by (seed, position in the run): posterior noise, t, noise and label dropout do not depend
on the batch, the rank, the world size or on what ran before.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_fast import philox
from dit_fast.config import FlowConfig
from dit_fast.diffusion import Path, time_sampler, velocity_error
from dit_fast.methods import Methods, ModelFacts, StepContext, StepInputs
from dit_fast.models.base import Backbone
from dit_fast.ops import flow_error, flow_noised
from dit_fast.ops.flow import draws_noise_in_registers
from dit_fast.philox import Stream

Affine = float | Sequence[float]


class TrainingObjective(nn.Module):
    """`forward(batch, step)` -> (loss 0-d, logs of detached 0-d tensors).

    model: on any device; it is the only thing here that has parameters. scale, shift: of the data set,
    one number or one per channel. seed: of the run. precision "bf16": the forward runs under autocast, weights and
    losses stay float32. label_dropout: probability of the null label. Block outputs are taken only where a method
    asked for them. Raises ConfigError where a method does not fit the model.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: Backbone,
        methods: Methods,
        flow: FlowConfig,
        *,
        seed: int,
        scale: Affine = 1.0,
        shift: Affine = 0.0,
        label_dropout: float = 0.0,
        precision: Literal["fp32", "bf16"] = "fp32",
    ):
        super().__init__()
        self.model = model
        self.methods, self.seed, self.label_dropout, self.precision = methods, seed, label_dropout, precision
        self.path = Path(flow.path)
        self.times = time_sampler(flow.time, flow.path, flow.time_mean, flow.time_std)
        self.facts = ModelFacts.of(model)
        self.taps = methods.taps(self.facts)
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def forward(self, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: moments float32 [n, 2, C, h, w] (mean, std), label int64 [n], position int64 [n], further fields.

        step counts optimizer steps from 0. The loss is float32; so is everything it is computed from after the model.
        """
        inputs = self._draw(batch, step)
        owner = self.methods.owner
        with torch.autocast(inputs.latents.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            context, losses = owner.forward(inputs, self.taps) if owner else self._flow_matching(inputs)
            terms = self.methods.terms(context)
        loss = losses.mean()
        logs = {owner.name if owner else "flow": loss.detach()}
        for name, term in terms.items():
            loss = loss + term.weight * term.value
            logs[name] = term.value.detach()
            logs.update({key: value.detach() for key, value in term.logs.items()})
        return loss, {"loss": loss.detach(), **logs}

    def _flow_matching(self, inputs: StepInputs) -> tuple[StepContext, Tensor]:
        draw = (inputs.latents, inputs.t, inputs.batch["position"], self.seed, self.path.name)
        fused = draws_noise_in_registers(inputs.latents)
        target: Any
        if fused:
            # Noise and target become tensors only if a method reads them.
            noised, target = flow_noised(*draw), partial(self._target, inputs)
        else:
            noised, target = self.path.interpolate(inputs.latents, inputs.noise, inputs.t)
        taps, labels = self.methods.tapping(self.facts), inputs.labels
        if self.label_dropout:
            labels = torch.where(inputs.drop, self.model.null(labels), labels)
        prediction = self.model(noised, inputs.t, labels, taps=taps)
        noise: Any = partial(getattr, inputs, "noise")
        context = StepContext(
            model=self.model,
            latents=inputs.latents,
            noise=noise,
            t=inputs.t,
            labels=labels,
            noised=noised,
            target=target,
            prediction=prediction,
            features=taps.features,
            batch=inputs.batch,
            step=inputs.step,
            seed=inputs.seed,
            collectors=taps.collectors,
        )
        return context, flow_error(prediction, *draw) if fused else velocity_error(prediction, target)

    def _target(self, inputs: StepInputs) -> Tensor:
        return self.path.interpolate(inputs.latents, inputs.noise, inputs.t)[1]

    def _draw(self, batch: Mapping[str, Tensor], step: int) -> StepInputs:
        position = batch["position"]
        mean, std = batch["moments"].unbind(1)
        shape = tuple(mean.shape[1:])
        sampled = mean + std * philox.normal(self.seed, position, Stream.POSTERIOR, shape)
        noise: Any = partial(philox.normal, self.seed, position, Stream.NOISE, shape)
        return StepInputs(
            model=self.model,
            latents=sampled * self.scale + self.shift,
            noise=noise,
            t=self.times.keyed(self.seed, position),
            labels=batch["label"],
            drop=philox.uniform(self.seed, position, Stream.LABEL_DROP, ()) < self.label_dropout,
            batch=batch,
            step=step,
            seed=self.seed,
        )
