"""Gaussian diffusion in steps (DDPM, arXiv 2006.11239) with a learned variance (Improved DDPM, 2102.09672).

q(x_k | x) = N(signal_k x, noise_k^2) for steps k = 0 .. n - 1 from data to noise; signal_k^2 is the product of
1 - beta_j up to k, and noise_k^2 = 1 - signal_k^2. A model predicts the noise eps in x_k, and logits l of the variance:

    p(x_(k-1) | x_k) = N((x_k - beta_k eps / noise_k) / sqrt(1 - beta_k), exp(log_variance))        (2006.11239, Eq. 11)
    log_variance = f log(beta_k) + (1 - f) log(least variance_k),   f = (l + 1) / 2                 (2102.09672, Eq. 15)

Settings are those of DiT (2212.09748): 1000 steps, beta from 1e-4 to 0.02 in equal steps, nothing clipped.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from dit_fast.diffusion.guidance import Guided, described, shapes_of
from dit_fast.errors import UserError
from dit_fast.models import split
from dit_fast.tree import Tree, each, image, label

STEPS = 1000


class Process:
    """Diffusion over some of the 1000 steps; tables are float64 [n], by place in `steps`.

    steps: two or more, as the model is told them; kept ascending. The betas of a choice are those with which x is
    distributed at the chosen steps as it is in the whole (2102.09672, Sec. 4).
    signal, noise: factors of data and noise. least_log, most_log: bounds of the log-variance, that of
    q(x_(k-1) | x_k, x), taken from k = 1 for k = 0 where there is none, and log(beta).
    """

    def __init__(self, steps: Sequence[float] = range(STEPS)):
        self.steps = tuple(sorted(int(step) for step in steps))
        kept = (1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64, device="cpu")).cumprod(0)[list(self.steps)]
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


def noise_and_logits(output: object, x: object) -> tuple[Tensor, Tensor]:
    """The two halves of a model's output [N, 2C, H, W] for x [N, C, H, W]. Raises UserError for what is none."""
    if not isinstance(x, Tensor) or shapes_of(output) != [len(x), 2 * x.shape[1], *x.shape[2:]]:
        raise UserError(
            f"the model returned {described(output)} for a state {described(x)}; it must be the noise and the logits "
            "of a variance, [N, 2C, H, W] for [N, C, H, W]"
        )
    eps, logits = cast(Tensor, output).chunk(2, 1)
    return eps, logits


def spaced_steps(count: int) -> list[float]:
    """`count` of the 1000 steps from the last to the first, at equal distances before rounding; whole numbers.

    As published, by repeated addition: at some odd counts (21, 23, 27, ...) a step that lies halfway between two whole
    ones is rounded to the other one than i * 999 / (count - 1) would be. Raises UserError below 2 and above 1000.
    """
    if not 2 <= count <= STEPS:
        raise UserError(f"num_steps={count} must lie from 2 to {STEPS}, the steps that the model was trained on")
    place, stride, steps = 0.0, (STEPS - 1) / (count - 1), list[float]()
    for _ in range(count):
        steps.append(round(place))
        place += stride
    return steps[::-1]


class Noise(Guided):
    """A model's noise and logits of the variance, [N, 2C, H, W], at step t; s is the next one, -1 after the last.

    model(x, t, y) gets t int64 [N]. Guidance is that of the noise, in channels 0 to 2 or in all of its C; the logits
    are the label's, as published (DiT), and the first output's. Its interval is one of t / 1000. Raises UserError for
    what is no image.
    """

    unit = STEPS

    def evaluate(self, x: Tree, t: float, s: float, y: Tree) -> Tree:
        output = self.model(
            each(lambda leaf: leaf.to(self.dtype), x),
            torch.full(label(y).shape, int(t), dtype=torch.int64, device=label(y).device),
            y,
        )
        value, second = split(output)
        sound = second is None or shapes_of(second) == shapes_of(x)
        eps, logits = noise_and_logits(value if sound else output, x)
        eps = image(self.guidance.extrapolated(eps, second, t / self.unit, s / self.unit))
        return torch.cat((eps, logits.double()), 1)

    def combine(self, label: Tree, null: Tree) -> Tree:
        (eps, logits), (free, _) = image(label).chunk(2, 1), image(null).chunk(2, 1)
        return torch.cat((image(self.guidance.combine(eps, free)), logits), 1)


def ddpm(v: Guided, x: Tree, times: Sequence[float], path: object, noise: Callable[[int], Tree]) -> Iterator[Tree]:
    """Ancestral sampling from p, with noise(i) in every step but the last, which takes the mean."""
    process, state = Process(times), image(x)
    for i, (t, s) in enumerate(pairwise((*times, -1))):
        k = len(times) - 1 - i
        beta, level, least, most = (
            table[k].item() for table in (process.betas, process.noise, process.least_log, process.most_log)
        )
        eps, logits = image(v(state, t, s)).chunk(2, 1)
        state = (state - beta / level * eps) / (1 - beta) ** 0.5
        if k:
            state = state + (log_variance(logits, least, most) / 2).exp() * image(noise(i))
        yield state


def ddim(v: Guided, x: Tree, times: Sequence[float]) -> Iterator[Tree]:
    """DDIM (arXiv 2010.02502, Eq. 12) with eta = 0: the predicted x, and the same noise at the next step's level."""
    process, state = Process(times), image(x)
    for i, (t, s) in enumerate(pairwise((*times, -1))):
        k = len(times) - 1 - i
        eps = image(v(state, t, s)).chunk(2, 1)[0]
        state = (state - process.noise[k].item() * eps) / process.signal[k].item()
        if k:
            state = process.signal[k - 1].item() * state + process.noise[k - 1].item() * eps
        yield state
