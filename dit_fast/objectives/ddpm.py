"""DDPM with a learned variance (arXiv 2006.11239, 2102.09672), as DiT (2212.09748) is trained.

    x_t = signal_t x + noise_t eps,   t whole in 0 .. 999,   model(x_t, t, y) -> (eps^, l)
    loss = mean (eps^ - eps)^2 + variational,   variational = KL(q(x_(t-1) | x_t, x) || p(x_(t-1) | x_t)) in bits

with the tables and p of `dit_fast.diffusion.ddpm`. Both normals have their means in x_t and eps alone, so that means
differ by d_t (eps - eps^). At t = 0 the variational term is -log2 of the probability that p gives to the interval
[x - 1/255, x + 1/255], open to the side where |x| > 0.999. It trains the variance only: eps^ is detached there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dit_fast.diffusion import SOLVERS, Guidance, Path
from dit_fast.diffusion.checks import check_labels, readable
from dit_fast.diffusion.ddpm import STEPS, Noise, log_variance, noise_and_logits, tables
from dit_fast.diffusion.paths import along
from dit_fast.diffusion.solvers import Field
from dit_fast.errors import ConfigError, UserError
from dit_fast.models import Backbone, Output, Taps, split
from dit_fast.models.base import PRESETS
from dit_fast.objectives.base import Context, Objective, noise_for
from dit_fast.ops.draws import Key
from dit_fast.philox import Stream
from dit_fast.tree import Tree, each, image, like

Network = Callable[[Tensor, Tensor, Tensor], Output]  # (x_t, t int64 [N], y) -> [N, 2C, H, W]


class DDPMLosses(NamedTuple):
    """Each [N], means over C, H, W. mse: of the noise. variational: in bits. total: their sum, which is trained."""

    mse: Tensor
    variational: Tensor
    total: Tensor


def ddpm_losses(model: Network, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> DDPMLosses:
    """Losses of a predicted noise and variance; model(x_t, t, y) -> [N, 2C, H, W], the noise first.

    x, noise: [N, C, H, W]; y: labels [N]; t: int64 [N] in 0 .. 999. In at least float32, float64 for float64 inputs.
    Source: 2102.09672, Eq. 16 with a weight of 1, as in DiT's code. Raises UserError for times that are not whole
    steps, labels that the model does not have (values on a GPU, for which a look would wait, are not looked at), and
    shapes that do not fit.
    """
    sound = isinstance(t, Tensor) and t.shape == (len(x),) and t.dtype in (torch.int64, torch.int32)
    if not sound or (readable(t) and bool(((t < 0) | (t >= STEPS)).any())):
        raise UserError(f"ddpm_losses needs times t of shape [{len(x)}], int64 in 0 .. {STEPS - 1}")
    check_labels(model, y, len(x))
    if x.shape != noise.shape:
        raise UserError(f"x and noise must be of one shape [N, C, H, W], not {list(x.shape)} and {list(noise.shape)}")
    return losses_of(split(model(noised(x, noise, t), t, y))[0], x, t, noise)


def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for t [N], of the shape [N, ...] of x and noise, in their common dtype."""
    signal, level, *_ = _at(t, x, torch.promote_types(x.dtype, noise.dtype))
    return signal * x + level * noise


def losses_of(output: Tree, x: Tensor, t: Tensor, noise: Tensor) -> DDPMLosses:
    """Losses of what the model made of x_t; the rest as in `ddpm_losses`."""
    eps, logits = noise_and_logits(output, x)
    wide = torch.promote_types(torch.promote_types(eps.dtype, x.dtype), torch.float32)
    error = eps.to(wide) - noise.to(wide)
    _, _, d, least, most = _at(t, x, wide)
    difference, learned = d * error.detach(), log_variance(logits.to(wide), least, most)
    divergence = (learned - least + torch.exp(least - learned) - 1 + difference.square() * torch.exp(-learned)) / 2
    nats = torch.where(along(t == 0, x), _interval_nll(x.to(wide), difference, learned), divergence)
    mse, variational = error.square().flatten(1).mean(1), nats.flatten(1).mean(1) / math.log(2)
    return DDPMLosses(mse, variational, mse + variational)


def _interval_nll(x: Tensor, difference: Tensor, log_variance: Tensor) -> Tensor:
    """-ln P(x - 1/255 .. x + 1/255) under a normal whose mean lies at x - difference; open at the ends of the range.

    With the published approximation of the normal's distribution function, in the published form: far from the mean its
    rounding shows.
    """
    narrow = torch.exp(-log_variance / 2)

    def below(z: Tensor) -> Tensor:
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    upper, lower = below(narrow * (difference + 1 / 255)), below(narrow * (difference - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -inside.clamp(min=1e-12).log()


def _at(t: Tensor, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Each of `tables` at t [N]: [N, 1, ...], without waiting for the device."""
    return tuple(along(table, like) for table in tables(t.device)[:, t].to(dtype))


class DDPM(Objective):
    """Error of the predicted noise, and the variational term that trains the variance, at whole steps."""

    name = "ddpm"
    title = "DDPM"
    path = Path("vp")  # of which these are steps (2011.13456, App. B); nothing is computed from it
    prediction = "noise"
    solvers: ClassVar = {name: solver for name, solver in SOLVERS.items() if solver.follows == "noise"}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """1000 steps, beta from 1e-4 to 0.02 in equal steps, uniform t, variance between two bounds, as DiT."""

        name: ClassVar[str] = "ddpm"

    def __init__(self, config: Config, model: Backbone):
        """Raises ConfigError for a model without a variance, of two times or with a class token."""
        name = model.config.name
        if not model.learns_variance:
            alike = f"DiT-{name.partition('-')[2]}"
            raise ConfigError(
                f"objective=ddpm needs a model that predicts a variance, unlike {name}; set "
                f"model={alike if alike in PRESETS else 'DiT-XL/2'}"
            )
        if model.times != 1:
            raise ConfigError("objective=ddpm tells its model one step t, not two times; set model.times=1")
        if model.class_token:
            raise ConfigError(
                "objective=ddpm samples no class token: each step would need a variance for it, which the model does "
                "not predict; set model.class_token=0, or objective=flow"
            )

    def run(
        self, model: Backbone, x: Tree, y: Tensor, key: Key, taps: Taps, batch: Mapping[str, Tensor], number: int
    ) -> Context:
        t = (key.uniform(Stream.TIME, ()).double() * STEPS).long()
        noise = noise_for(x, key)
        given = self.interpolate(x, noise, t)[0]
        whole, second = split(model(given, t, y, taps))
        output = image(whole)
        found = losses_of(output, image(x), t, image(noise))
        logs = {"ddpm/mse": found.mse.mean(), "ddpm/variational": found.variational.mean()}
        prediction = like(x, {"image": output.chunk(2, 1)[0]})
        losses = {"image": found.total}
        return Context(self, model, x, y, key, t, given, prediction, losses, taps, batch, number, logs, second)

    def interpolate(self, x: Tree, noise: Tree, t: Tensor) -> tuple[Tree, Tree]:
        """x_t at steps t int64 [N], and the noise."""
        return each(lambda data, drawn: noised(data, drawn, t), x, noise), noise

    def earlier(self, times: Tensor, shift: Tensor) -> Tensor:
        """Whole steps: clamp(t - floor(1000 shift), 1, 999), as SRA has it for DiT."""
        return (times - (STEPS * shift).long()).clamp(1, STEPS - 1)

    def unit(self, times: Tensor) -> Tensor:
        return times / STEPS

    def from_unit(self, t: Tensor) -> Tensor:
        """The nearest step."""
        return (STEPS * t).round().long().clamp(0, STEPS - 1)

    def field(self, model: Backbone, y: Tree, guidance: Guidance) -> Field:
        """Noise and logits of the variance, float64 [N, 2C, H, W], at step t."""
        return Noise(model, y, guidance)
