"""Which loss term pulls at which block: the gradient of each term with respect to each block's weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.analysis.blocks import read_samples
from dit_fast.checkpoint.step import Checkpoint
from dit_fast.data import LatentDataset
from dit_fast.errors import UserError
from dit_fast.methods import Term, build_methods
from dit_fast.models import new_model
from dit_fast.objectives import OBJECTIVES, Context
from dit_fast.runs import stored
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.rest import method_tensors
from dit_fast.train.stages import load_frozen, newest_folder


@dataclass(frozen=True)
class TermGradients:
    """By loss term (the objective's first), as it counts in the sum, its weight included, and block from 0.

    norm, float64 [terms, K]: of the term's gradient with respect to the block's weights. projection [terms, K]: of that
    on the gradient of the whole loss, as a share of the latter's length; over terms it adds up to 1.
    """

    terms: tuple[str, ...] = ()
    norm: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    projection: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


class _Terms(TrainingLoss):
    """Remembers the summands of the loss, which `forward` adds up."""

    summands: dict[str, Tensor]

    def _terms(self, context: Context) -> dict[str, Term]:
        terms = super()._terms(context)
        self.summands = {context.objective.name: context.losses["image"].mean()}
        self.summands |= {name: term.weight * term.value for name, term in terms.items()}
        return terms


def term_gradients(
    checkpoint: Checkpoint,
    dataset: LatentDataset,
    batches: int = 4,
    seed: int = 0,
    seen: Callable[[int], object] = lambda count: None,
) -> TermGradients:
    """Gradients of a run's weights (not their averages) at a checkpoint, of the mean loss over micro-batches.

    The micro-batches are of the run's size (some terms compare the samples in one), from the first samples of the data
    set on, with noise, times and dropped labels by (seed, sample); the same for all checkpoints and runs of that size.
    Methods are as they were in the step after the checkpoint. In float32. Raises UserError for too small a data set.
    """
    config, micro = stored(checkpoint.state["config"]), checkpoint.state["micro_batch"]
    if batches * micro > len(dataset):
        raise UserError(
            f"--gradient-batches {batches}: of {micro} samples each are more than the {len(dataset)} of the data set; "
            f"give at most {len(dataset) // micro}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = _build(checkpoint, config, dataset, seed).to(device).train()
    fields = tuple(dict.fromkeys(name for method in loss.methods for name in method.fields))
    weights: list[list[Tensor]] = [
        [weight for weight in block.parameters() if weight.requires_grad] for block in loss.model.blocks
    ]
    sums: dict[str, list[Tensor]] = {}
    for number in range(batches):
        samples = np.arange(number * micro, (number + 1) * micro, dtype=np.int64)
        batch = {name: value.to(device) for name, value in read_samples(dataset, samples, fields).items()}
        names: list[str] = []
        while not names or len(names) > 1:
            loss(batch, checkpoint.step)  # anew for each: a term may be differentiated once
            names = names[1:] or list(loss.summands)
            gradients = _gradient(loss.summands[names[0]], weights)
            known = sums.setdefault(names[0], [torch.zeros_like(gradient) for gradient in gradients])
            for total, gradient in zip(known, gradients, strict=True):
                total += gradient / batches
        seen(micro)
    return _shares(sums)


def _build(checkpoint: Checkpoint, config: Any, dataset: LatentDataset, seed: int) -> _Terms:
    model = new_model(config.model)
    objective = OBJECTIVES[config.objective.name](config.objective, model)
    methods = build_methods(config.methods, model, dataset.info)
    for method in methods:
        method.prepare(lambda path, weights: load_frozen(newest_folder(path), weights, config, dataset.info))
    model.load_state_dict(checkpoint.state_dict("model"))
    source = checkpoint.source("rest")
    for name, tensor in method_tensors(methods).items():
        tensor.detach().copy_(source(name))
    return _Terms(
        model,
        objective,
        methods,
        seed=seed,
        scale=dataset.info.scale,
        shift=dataset.info.shift,
        label_dropout=config.model.label_dropout,
    )


def _gradient(value: Tensor, weights: list[list[Tensor]]) -> list[Tensor]:
    """Of a term, by block, as one float64 vector each; zeros where it does not reach."""
    flat = [weight for block in weights for weight in block]
    constant: list[Tensor | None] = [None] * len(flat)
    found = iter(torch.autograd.grad(value, flat, allow_unused=True) if value.requires_grad else constant)
    vectors = []
    for block in weights:
        parts = [(weight, next(found)) for weight in block]
        vectors.append(
            torch.cat(
                [(torch.zeros_like(weight) if part is None else part).flatten() for weight, part in parts]
            ).double()
        )
    return vectors


def _shares(sums: dict[str, list[Tensor]]) -> TermGradients:
    norm = [[gradient.norm().item() for gradient in blocks] for blocks in sums.values()]
    whole = [sum(parts[1:], parts[0]) for parts in zip(*sums.values(), strict=True)]
    lengths = [max(each.square().sum().item(), torch.finfo(torch.float64).tiny) for each in whole]
    projection = [
        [(part @ total).item() / length for part, total, length in zip(blocks, whole, lengths, strict=True)]
        for blocks in sums.values()
    ]
    return TermGradients(tuple(sums), np.array(norm), np.array(projection))
