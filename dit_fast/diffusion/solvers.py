"""Solvers from noise (t = 1) to data (t = 0) as generators of states: Euler, Heun, the published SDE, mean flow.

Formulas: SiT (arXiv 2401.08740), Sec. 3.3, with the grids of REPA's samplers; MeanFlow (arXiv 2505.13447), Eq. 12.
A new one is a function here under `@solver`; commands, configuration and documentation take its name from SOLVERS.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dit_fast.diffusion.paths import Path
from dit_fast.tree import Tree, each

LAST_STOCHASTIC_TIME = 0.04

Field = Callable[[Tree, float, float], Tree]  # v(x, t, s): the velocity at time t of a step between t and s
Draw = Callable[[int], Tree]  # standard normal noise of a step's number, in the state's shapes


@dataclass(frozen=True)
class Solver:
    """solver(v, x, times) yields the state after each step of `times`, which run from noise to data.

    grid(num_steps): the published times. noisy: takes the path and noise(step) too. times: 2 where v is the mean
    velocity between t and s, of a model with two times; 1 where it is the velocity at t.
    """

    name: str
    steps: Callable[..., Iterator[Tree]]
    grid: Callable[[int], list[float]]
    noisy: bool = False
    times: Literal[1, 2] = 1

    def __call__(
        self, v: Field, x: Tree, times: Sequence[float], path: Path | None = None, noise: Draw | None = None
    ) -> Iterator[Tree]:
        return self.steps(v, x, times, *((path, noise) if self.noisy else ()))


SOLVERS: dict[str, Solver] = {}


def equal_steps(num_steps: int) -> list[float]:
    return _linspace(1.0, 0.0, num_steps + 1)


def to_last_stochastic_time(num_steps: int) -> list[float]:
    """num_steps - 1 equal steps to 0.04, then one to 0."""
    return [*_linspace(1.0, LAST_STOCHASTIC_TIME, num_steps), 0.0]


def solver(
    grid: Callable[[int], list[float]] = equal_steps, noisy: bool = False
) -> Callable[[Callable[..., Iterator[Tree]]], Solver]:
    def register(steps: Callable[..., Iterator[Tree]]) -> Solver:
        return SOLVERS.setdefault(steps.__name__, Solver(steps.__name__, steps, grid, noisy))

    return register


@solver()
def euler(v: Field, x: Tree, times: Sequence[float]) -> Iterator[Tree]:
    for t, s in pairwise(times):
        x = _step(x, s - t, v(x, t, s))
        yield x


@solver()
def heun(v: Field, x: Tree, times: Sequence[float]) -> Iterator[Tree]:
    """Second order; the last step is Euler's. The second evaluation, v(x, s, t), is of the same step: the field decides
    about guidance by the step's noisier end."""
    for t, s in pairwise(times):
        slope = v(x, t, s)
        if s != times[-1]:
            slope = each(lambda a, b: (a + b) / 2, slope, v(_step(x, s - t, slope), s, t))
        x = _step(x, s - t, slope)
        yield x


@solver(to_last_stochastic_time, noisy=True)
def sde(v: Field, x: Tree, times: Sequence[float], path: Path, noise: Draw) -> Iterator[Tree]:
    """Euler-Maruyama with diffusion 2t; the last step has no noise. The score comes from the velocity on the path."""
    for i, (t, s) in enumerate(pairwise(times)):
        velocity, diffusion = v(x, t, s), 2 * t
        drift = each(lambda u, a: u - diffusion / 2 * _score(path, u, a, t), velocity, x)  # noqa: B023
        x = _step(x, s - t, drift)
        if s != times[-1]:
            x = _step(x, (diffusion * (t - s)) ** 0.5, noise(i))
        yield x


# Euler on a mean velocity is exact in every step, so that one step may be enough
mean_flow = SOLVERS["mean_flow"] = replace(euler, name="mean_flow", times=2)

if TYPE_CHECKING:
    SolverName = str
else:
    SolverName = Literal[tuple(SOLVERS)]  # for the fields of configurations


def _step(x: Tree, length: float, slope: Tree) -> Tree:
    return each(lambda a, b: a + length * b, x, slope)


def _score(path: Path, velocity: Tensor, x: Tensor, t: float) -> Tensor:
    """grad log p_t(x) from the velocity (SiT, Eq. 9)."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


def _linspace(start: float, stop: float, count: int) -> list[float]:
    return torch.linspace(start, stop, count, dtype=torch.float64).tolist()
