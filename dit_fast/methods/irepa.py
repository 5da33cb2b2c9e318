"""iREPA (arXiv 2512.10794): what it does to REPA's targets. Its projector is `nn.projector.ConvProjector`."""

import math

from torch import Tensor

from dit_fast.errors import UserError

EPS = 1e-6


def spatial_normalize(z: Tensor, strength: float = 0.6, eps: float = EPS) -> Tensor:
    """(z - strength mean z) / (std z + eps), mean and unbiased std over the tokens of each sample and channel.

    z: [N, T, D], patch tokens only, at least two; the result has its dtype. strength: the paper's gamma; 1 takes the
    whole mean away. Published defaults: 0.6 (trainer on latents), 0.8 (trainer on pixels), 1.0 (the function). Source:
    iREPA, Sec. 4. Raises UserError for another shape, a strength that is not finite and an eps that is not 0 or more.
    """
    if z.dim() != 3 or z.shape[1] < 2:
        raise UserError(f"z must be [N, T, D] with at least two tokens, not {list(z.shape)}")
    if not math.isfinite(strength) or not 0 <= eps < math.inf:
        raise UserError(f"strength={strength} must be a finite number, eps={eps} 0 or more")
    wide = z.double() if z.dtype.itemsize == 8 else z.float()
    deviation, mean = wide.std(1, keepdim=True), wide.mean(1, keepdim=True)
    return ((wide - strength * mean) / (deviation + eps)).to(z.dtype)
