"""Contrastive flow matching (arXiv 2506.05350): a prediction is pushed away from the target of another sample.

loss = |f - v|^2 - weight |f - v_j|^2,       j uniform among the other samples of the micro-batch
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.diffusion import velocity_error
from dit_fast.diffusion.checks import readable
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.base import Method, Term
from dit_fast.models import Backbone
from dit_fast.objectives import Context
from dit_fast.ops.draws import Key
from dit_fast.options import setting
from dit_fast.philox import Stream
from dit_fast.tree import image, label

PARTNER_STREAM = Stream.METHOD + 2
WEIGHT = 0.05  # of the paper


class ContrastiveFlowLosses(NamedTuple):
    """flow, contrast: mean squared error against the own and the other target. loss: flow - weight contrast. [N]."""

    flow: Tensor
    contrast: Tensor
    loss: Tensor


def contrastive_flow_losses(
    prediction: Tensor,
    target: Tensor,
    negative_index: Tensor,
    weight: float = WEIGHT,
    keep: Tensor | None = None,
) -> ContrastiveFlowLosses:
    """Means over all but the first dimension, [N] in at least float32; the target gets no gradient.

    prediction, target: [N, ...]. negative_index: int64 [N], whose target each sample is pushed away from
    (`draw_partners`). keep: bool [N], the samples that are contrasted; the others count 0 and those are multiplied by
    N / (their number), so that the mean over N is a mean over them. None: all. No sample left: 0.
    Source: paper, Eq. 6; published code, `triplet_loss.py`. Raises UserError for shapes that do not fit, and indices of
    no sample (on a GPU, where that would wait for the device, they are not looked at).
    """
    if prediction.shape != target.shape:
        raise UserError(f"prediction {list(prediction.shape)} and target {list(target.shape)} must be of one shape")
    if not math.isfinite(weight):
        raise UserError(f"weight={weight} must be a finite number (paper: {WEIGHT})")
    for name, index, kind in (("negative_index", negative_index, torch.int64), ("keep", keep, torch.bool)):
        if index is not None and (index.shape != prediction.shape[:1] or index.dtype != kind):
            raise UserError(f"{name} must be {kind} [{len(prediction)}], not {index.dtype} {list(index.shape)}")
    if readable(negative_index) and bool(((negative_index < 0) | (negative_index >= len(target))).any()):
        raise UserError(f"negative_index must lie in 0 .. {len(target) - 1}, the samples of this batch")
    target = target.detach()
    flow, contrast = velocity_error(prediction, target), velocity_error(prediction, target[negative_index])
    contrast = contrast if keep is None else only(contrast, keep)
    return ContrastiveFlowLosses(flow, contrast, flow - weight * contrast)


def only(errors: Tensor, keep: Tensor) -> Tensor:
    """errors [N] of the samples to keep (bool [N]), times N / (their number); 0 for the others."""
    return torch.where(keep, errors, 0) * (len(errors) / keep.sum().clamp(min=1).to(errors.dtype))


def draw_partners(key: Key) -> Tensor:
    """For each sample of a batch of N > 1 another one of it, uniform and keyed by its position: int64 [N]."""
    count = len(key.position)
    ahead = (key.uniform(PARTNER_STREAM, ()).double() * (count - 1)).long()  # 0 .. N - 2; a float32 might round up
    return (torch.arange(count, dtype=torch.int64, device=ahead.device) + 1 + ahead) % count


class ContrastiveFlow(Method):
    """The contrast of the image, with a negative weight; another leaf of what is denoised is left alone."""

    name = "contrastive_flow"
    title = "contrastive flow matching"
    about = "predictions are pushed away from the targets of other samples"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """How strongly samples are pushed from each other, and which."""

        name: ClassVar[str] = "contrastive_flow"
        weight: float = setting(WEIGHT, "What the contrast is multiplied by and taken off (paper: 0.05)", "[0, 1)")
        skip_null: bool = setting(False, "Leave out samples whose label was dropped")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Raises ConfigError for a model whose target is not the sample's own velocity or data."""
        super().__init__(config, model, data)
        if model.learns_variance:
            raise ConfigError(NOISE.format("objective=ddpm"))
        if model.times != 1:
            raise ConfigError(
                "contrastive_flow compares with the velocities of other samples, and the target of a mean velocity "
                "(model.times=2) holds the model's own derivative at the sample; set objective=flow model.times=1, or "
                "leave contrastive_flow out"
            )

    @staticmethod
    def stages(config: Any, run: Any) -> list[Any]:
        """Raises ConfigError for a prediction of noise."""
        prediction = getattr(run.objective, "prediction", "velocity")
        if prediction in ("noise", "score"):
            raise ConfigError(NOISE.format(f"objective.prediction={prediction}"))
        return [run]

    def check_batch(self, micro_batch: int) -> None:
        """Raises ConfigError for one sample, which has no other."""
        if micro_batch < 2:
            raise ConfigError(
                "contrastive_flow takes its partner from the micro-batch, which holds one sample; set "
                "engine.micro_batch=2 or more"
            )

    def terms(self, context: Context) -> dict[str, Term]:
        prediction, target = image(context.prediction), image(context.target).detach()
        contrast = context.objective.errors(prediction, target[draw_partners(context.key)], context.t)["image"]
        if self.config.skip_null:
            contrast = only(contrast, label(context.y) != context.model.null_label)
        return {"contrastive_flow/contrast": Term(contrast.mean(), -self.config.weight)}


NOISE = (
    "contrastive_flow with {}: the noise of another sample says nothing of its image, and to be far from it is only to "
    "be longer; set objective=flow objective.prediction=velocity, or x"
)
