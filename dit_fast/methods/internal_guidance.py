"""Internal guidance (arXiv 2512.24176): a second head on an earlier block learns what the model learns, only worse.

Its error is one more term of the loss. A sampler then leads away from it, v = v_aux + ig_scale (v - v_aux): see
`dit_fast.diffusion.guidance`. The head is the backbone's (`SiT.Config.auxiliary_depth`), because samplers run it too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.diffusion import Path, velocity_error
from dit_fast.diffusion.checks import check_batch
from dit_fast.diffusion.paths import as_path
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.base import Method, Term
from dit_fast.models import Backbone, Output, split
from dit_fast.objectives import Context
from dit_fast.options import setting
from dit_fast.tree import image


class InternalGuidanceLosses(NamedTuple):
    """flow, auxiliary: mean squared error of the first and of the second velocity, [N]."""

    flow: Tensor
    auxiliary: Tensor


def internal_guidance_losses(
    model: Callable[[Tensor, Tensor, Tensor], Output],
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    path: Path | str = "linear",
) -> InternalGuidanceLosses:
    """Both losses of model(x_t, t, y) -> (v, v_aux), against one target; the published total is flow + 0.5 auxiliary.

    x, noise [N, C, H, W]; y [N] int64; t [N] in [0, 1]. Means over C, H, W in at least float32; nothing is detached.
    Source: the published code, `loss.py`. Raises UserError as `check_batch`, and for a model that
    returns no second velocity.
    """
    check_batch(model, x, y, t, path)
    noised, velocity = as_path(path).interpolate(x, noise, t)
    first, second = split(model(noised, t, y))
    if second is None:
        raise UserError("internal_guidance_losses needs a model that returns two velocities (auxiliary_depth)")
    return InternalGuidanceLosses(velocity_error(image(first), velocity), velocity_error(image(second), velocity))


class InternalGuidance(Method):
    """The error of the model's auxiliary head, weighted over t as the base loss is."""

    name = "internal_guidance"
    title = "internal guidance"
    about = "a second head on an earlier block learns the same, and samples may be led away from it"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """How much the second head's errors count; `model.auxiliary_depth` says where it stands."""

        name: ClassVar[str] = "internal_guidance"
        weight: float = setting(0.5, "Weight of the term", "[0, 1e6]")
        class_token_weight: float = setting(
            0.03, "Share in it of the class token's error, where one is denoised (as in REG)", "[0, 1e6]"
        )

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Raises ConfigError for a model without an auxiliary head, and for one of a mean velocity."""
        super().__init__(config, model, data)
        if model.times != 1:
            raise ConfigError(
                "internal_guidance teaches a second head the velocity at one time; a mean velocity (model.times=2) has "
                "its guidance in its target already; set objective=flow model.times=1, or leave internal_guidance out"
            )
        if not hasattr(model.config, "auxiliary_depth"):
            raise ConfigError(
                f"internal_guidance trains a second head, which {model.config.name} cannot have; use SiT-..."
            )
        if not auxiliary(model):
            raise ConfigError(
                "internal_guidance trains a second head; set model.auxiliary_depth to one of the blocks "
                f"1..{model.depth} (published: 8)"
            )

    def terms(self, context: Context) -> dict[str, Term]:
        assert context.second is not None
        errors = context.objective.errors(context.second, context.target, context.t)
        value = errors.pop("image").mean()
        for error in errors.values():
            value = value + self.config.class_token_weight * error.mean()
        return {"internal_guidance/auxiliary": Term(value, self.config.weight)}


def auxiliary(model: Backbone) -> int:
    """The block, from 1, with a model's auxiliary head; 0 where it has none."""
    return getattr(model.config, "auxiliary_depth", 0)
