"""From a micro-batch of latent moments to the summed loss: the objective's, plus the terms of the configured methods.

Every random number is keyed by (noise seed, position in the run): posterior noise, label dropout and what the objective
draws do not depend on the batch, the rank, the world size or on what ran before.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.methods import Method, Term
from dit_fast.models import Backbone, Taps
from dit_fast.objectives import Context, Objective
from dit_fast.ops.draws import Draw, Key
from dit_fast.philox import Stream
from dit_fast.tree import Tree

Affine = float | Sequence[float]


class TrainingLoss(nn.Module):
    """`forward(batch, number)` -> (loss 0-d, logs of detached 0-d tensors); the only code that an engine calls.

    model: on any device; it is the only thing here that has parameters. methods: bound to it. scale, shift: of the data
    set, one number or one per channel. seed: of all that is drawn here. precision "bf16": the forward runs under
    autocast, weights and losses stay float32. label_dropout: probability of the null label. Block outputs are taken
    only where a method asked for them, and of a method that has stopped no more than its `lasting_terms` is computed.
    """

    autocast_dtype = torch.bfloat16  # a baseline has another
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: Backbone,
        objective: Objective,
        methods: Sequence[Method] = (),
        *,
        seed: int,
        scale: Affine = 1.0,
        shift: Affine = 0.0,
        label_dropout: float = 0.0,
        precision: Literal["fp32", "bf16"] = "fp32",
    ):
        super().__init__()
        self.model, self.objective, self.methods = model, objective, tuple(methods)
        self.seed, self.label_dropout, self.precision = seed, label_dropout, precision
        self._draws: Sequence[Draw] = ()  # what the last batch asked its key for
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def kind(self, number: int) -> tuple[Hashable, ...]:
        """All that a step depends on through its number; equal for steps that differ by their data alone."""
        return tuple(method.kind(number) for method in self.methods)

    def forward(self, batch: Mapping[str, Tensor], number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: moments float32 [n, 2, C, h, w] (mean, std) or [n, 1, C, h, w] (mean), label int64 [n], position
        int64 [n], further fields.

        number: of the optimizer step, from 0. The loss is float32; so is all that it is computed from after the model.
        """
        key = Key(self.seed, batch["position"], self._draws)
        with torch.autocast(batch["moments"].device.type, self.autocast_dtype, enabled=self.precision == "bf16"):
            batch = self._complete(batch, number)
            x, y, taps = self._state(batch, key), self._labels(batch["label"], key), self._taps(number)
            context = self.objective.run(self.model, x, y, key, taps, batch, number)
            terms = self._terms(context)
        self._draws = key.asked  # steps ask for the same draws
        loss = context.losses["image"].mean()
        logs = {self.objective.name: loss.detach(), **{name: value.detach() for name, value in context.logs.items()}}
        for name, term in terms.items():
            loss = loss + term.weight * term.value
            logs[name] = term.value.detach()
            logs.update({key: value.detach() for key, value in term.logs.items()})
        return loss, {"loss": loss.detach(), **logs}

    @torch.no_grad()
    def _complete(self, batch: Mapping[str, Tensor], number: int) -> Mapping[str, Tensor]:
        made: dict[str, Tensor] = {}
        for method in self.methods:
            made |= method.complete(batch, method.active(number))
        return {**batch, **made} if made else batch

    def _state(self, batch: Mapping[str, Tensor], key: Key) -> Tree:
        """Latents drawn from their posterior, in the model's space, and what methods make of them."""
        latents, *std = batch["moments"].unbind(1)
        if std:
            latents = latents + std[0] * key.normal(Stream.POSTERIOR, tuple(latents.shape[1:]))
        x: Tree = latents * self.scale + self.shift
        for method in self.methods:
            x = method.state(x, batch, key)
        return x

    def _labels(self, labels: Tensor, key: Key) -> Tensor:
        if not self.label_dropout:
            return labels
        drop = key.uniform(Stream.LABEL_DROP, ()) < self.label_dropout
        return torch.where(drop, self.model.null(labels), labels)

    def _taps(self, number: int) -> Taps:
        active = [method for method in self.methods if method.active(number)]
        blocks = frozenset[int]().union(*(method.blocks for method in active))
        attention = frozenset[int]().union(*(method.attention for method in active))
        made = [(method, method.collector()) for method in active]
        collectors = {method.name: (each, method.blocks) for method, each in made if each is not None}
        return Taps(blocks, collectors, attention)

    def _terms(self, context: Context) -> dict[str, Term]:
        collected: dict[str, Term] = {}
        for method in self.methods:
            if not (active := method.active(context.number)):
                method.release()
            for name, term in (method.terms if active else method.lasting_terms)(context).items():
                for key in (name, *term.logs):
                    if not key.startswith(f"{method.name}/"):
                        raise ConfigError(f"method '{method.name}' names a term '{key}'; use '{method.name}/{key}'")
                if term.value.dim():
                    shape = list(term.value.shape)
                    raise ConfigError(f"'{name}' of method '{method.name}' is {shape}; a term is one number, 0-d")
                collected[name] = term
        return collected
