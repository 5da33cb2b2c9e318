"""Gaussian diffusion in steps (DDPM, arXiv 2006.11239) with a learned variance (Improved DDPM, 2102.09672).

q(x_k | x) = N(signal_k x, noise_k^2) for steps k = 0 .. n - 1 from data to noise; signal_k^2 is the product of
1 - beta_j up to k, and noise_k^2 = 1 - signal_k^2. A model predicts the noise eps in x_k, and logits l of the variance:

    p(x_(k-1) | x_k) = N((x_k - beta_k eps / noise_k) / sqrt(1 - beta_k), exp(log_variance))        (2006.11239, Eq. 11)
    log_variance = f log(beta_k) + (1 - f) log(least variance_k),   f = (l + 1) / 2                 (2102.09672, Eq. 15)

Settings are those of DiT (2212.09748): 1000 steps, beta from 1e-4 to 0.02 in equal steps, nothing clipped.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from dit_fast.errors import UserError

STEPS = 1000


class Process:
    """Diffusion over some of the 1000 steps; tables are float64 [n], by place in `steps`.

    steps: two or more, ascending, as the model is told them. The betas of a choice are those with which x is
    distributed at the chosen steps as it is in the whole (2102.09672, Sec. 4).
    signal, noise: factors of data and noise. least_log, most_log: bounds of the log-variance, that of
    q(x_(k-1) | x_k, x), taken from k = 1 for k = 0 where there is none, and log(beta).
    """

    def __init__(self, steps: Sequence[int] = range(STEPS)):
        self.steps = tuple(steps)
        kept = (1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64, device="cpu")).cumprod(0)[list(steps)]
        self.signal, self.noise = kept.sqrt(), (1 - kept).sqrt()
        before = torch.cat((kept.new_ones(1), kept[:-1]))
        self.betas = 1 - kept / before
        least = self.betas[1:] * (1 - before[1:]) / (1 - kept[1:])
        self.least_log, self.most_log = torch.cat((least[:1], least)).log(), self.betas.log()


@cache
def tables(device: torch.device) -> Tensor:
    """signal, noise, d, least_log, most_log of the whole process, float64 [5, 1000]; copied to a device once.

    d: by how much the mean of p falls as the predicted noise grows, beta / (noise sqrt(1 - beta)).
    """
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        whole = Process()
        d = whole.betas / (whole.noise * (1 - whole.betas).sqrt())
        return torch.stack((whole.signal, whole.noise, d, whole.least_log, whole.most_log)).to(device)


def log_variance(logits: Tensor, least: Tensor | float, most: Tensor | float) -> Tensor:
    """Learned log-variance between two bounds that logits of -1 and 1 stand for; logits may lie beyond."""
    share = (logits + 1) / 2
    return share * most + (1 - share) * least


def spaced_steps(count: int) -> list[int]:
    """`count` of the 1000 steps from the first to the last, ascending, at equal distances before rounding.

    As published, by repeated addition: at some odd counts (21, 23, 27, ...) a step that lies halfway between two whole
    ones is rounded to the other one than i * 999 / (count - 1) would be. Raises UserError below 2 and above 1000.
    """
    if not 2 <= count <= STEPS:
        raise UserError(f"num_steps={count} must lie from 2 to {STEPS}, the steps that the model was trained on")
    place, stride, steps = 0.0, (STEPS - 1) / (count - 1), []
    for _ in range(count):
        steps.append(round(place))
        place += stride
    return steps
