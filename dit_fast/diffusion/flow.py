"""Flow matching with velocity prediction (SiT, REPA): the mean squared error of the velocity, per sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit_fast.diffusion.checks import check_batch
from dit_fast.diffusion.paths import Path, as_path
from dit_fast.diffusion.times import TimeSampler, uniform
from dit_fast.errors import UserError
from dit_fast.models import Output, split
from dit_fast.tree import image


def flow_loss(
    model: Callable[[Tensor, Tensor, Tensor], Output],
    x: Tensor,
    y: Tensor,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    path: Path | str = "linear",
    generator: torch.Generator | None = None,
    times: TimeSampler | None = None,
) -> Tensor:
    """Mean over C, H, W of (model(x_t, t, y) - v)^2 as float32 [N] (float64 for float64 inputs).

    x: latents [N, C, H, W]; y: labels [N]. t [N] and noise (shape of x) are drawn where not given, t first: from
    `times` (uniform by default) and the standard normal, with `generator` or torch's own. Raises UserError as
    `check_batch`, and for shapes.
    """
    device = x.device if generator is None else generator.device
    if t is None:
        t = (times or uniform()).sample(len(x), generator, x.device)
    check_batch(model, x, y, t, path)
    if noise is None:
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    noised, target = as_path(path).interpolate(x, noise, t)
    return velocity_error(image(split(model(noised, t, y))[0]), target)


def velocity_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all but the first dimension, [N], in at least float32.

    Raises UserError for two shapes: broadcast, they would give another mean without a word.
    """
    if prediction.shape != target.shape:
        raise UserError(f"the model returned {list(prediction.shape)}; it must be like its target {list(target.shape)}")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(1)
