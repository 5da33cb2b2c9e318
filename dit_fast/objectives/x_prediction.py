"""Prediction of the clean data with the loss of the velocity (JiT, arXiv 2511.13720), as a plain function.

    z = (1 - t) x + t noise_scale e,   v = (z - f(z, t, y)) / d,   d = max(t, t_eps),   loss = mean (x - f)^2 / d^2.

Below t_eps, (z - x) / d is not the velocity of the path. A run has it as `objective.prediction=x
objective.weighting=velocity`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dit_fast.diffusion import velocity_error
from dit_fast.diffusion.checks import check_batch, check_t_eps
from dit_fast.diffusion.conversions import T_EPS, convert, error_weight, training_pair
from dit_fast.errors import UserError
from dit_fast.models import Output, split
from dit_fast.tree import image


class XPredictionLosses(NamedTuple):
    """x_prediction, velocity: like the data [N, C, H, W]. loss: [N]."""

    x_prediction: Tensor
    velocity: Tensor
    loss: Tensor


def x_prediction_losses(
    model: Callable[[Tensor, Tensor, Tensor], Output],
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    noise_scale: float = 1.0,
    t_eps: float = T_EPS,
) -> XPredictionLosses:
    """Of model(z, t, y) -> clean data; x, noise [N, C, H, W], y int64 [N], t [N] from 0 (data) to 1 (noise).

    loss: mean over C, H, W in at least float32. Raises UserError as `check_batch`, for shapes, for a
    noise_scale that is not positive and for a t_eps that is not between 0 and 1.
    """
    if not 0 < noise_scale < math.inf:
        raise UserError(f"noise_scale={noise_scale} must be a finite number above 0")
    check_t_eps(t_eps, used=True)
    check_batch(model, x, y, t, prediction="x")
    z, clean = training_pair(x, noise_scale * noise, t, prediction="x")
    output = image(split(model(z, t, y))[0])
    error = velocity_error(output, clean)
    loss = error * error_weight(t.to(error.dtype), "linear", "x", "velocity", t_eps)
    return XPredictionLosses(output, convert(output, z, t, source="x", t_eps=t_eps), loss)
