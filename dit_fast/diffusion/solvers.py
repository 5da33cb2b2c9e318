"""Solvers from noise (t = 1) to data (t = 0) as generators of states: Euler, Heun, Runge-Kutta, SDEs, mean flow.

Formulas: SiT (arXiv 2401.08740), Sec. 3.3 and its transport code, with the grids of REPA's samplers; MeanFlow (arXiv
2505.13447), Eq. 12. A new one is a function here under `@solver`; commands, configuration and documentation take its
name from SOLVERS, and its keyword-only parameters are the options that `sample` passes on.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch

from dit_fast.diffusion import ddpm
from dit_fast.diffusion.paths import Path
from dit_fast.diffusion.reverse import Diffusion, LastStep, Reverse
from dit_fast.errors import UserError
from dit_fast.tree import Tree, each, leaves, like

Field = Callable[[Tree, float, float], Tree]  # v(x, t, s): the velocity at time t of a step between t and s
Draw = Callable[[int], Tree]  # standard normal noise of a step's number, in the state's shapes
Follows = Literal["velocity", "mean_velocity", "noise"]
LAST_STOCHASTIC_TIME = 0.04


@dataclass(frozen=True)
class Solver:
    """solver(v, x, times, **options) yields the state after each step of `times`, which run from noise to data.

    follows: what v(x, t, s) is, and so which models it can sample: "velocity", at t; "mean_velocity", between t and s,
    of a model with two times; "noise", noise and logits of a variance of a model that learns one, at whole steps
    (`ddpm.Noise`). In an evaluation after the first of a step, s is the step's start.
    grid(num_steps, start, end): the published times; of whole steps, grid(num_steps). draws: dtype of normals that a
    torch generator gives, as published. noisy: takes the path and noise(step) too; its times are those
    between which noise is added. adaptive: takes the first and the last time alone and chooses its steps by the error
    of all rows of the batch.
    """

    name: str
    steps: Callable[..., Iterator[Tree]]
    grid: Callable[..., list[float]]
    noisy: bool = False
    adaptive: bool = False
    follows: Follows = "velocity"
    draws: torch.dtype = torch.float64

    def __call__(
        self,
        v: Field,
        x: Tree,
        times: Sequence[float],
        path: Path | None = None,
        noise: Draw | None = None,
        **options: float | str,
    ) -> Iterator[Tree]:
        return self.steps(v, x, times, *((path, noise) if self.noisy else ()), **options)

    @property
    def options(self) -> dict[str, object]:
        """Its own options by name, with their defaults."""
        parameters = inspect.signature(self.steps).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


SOLVERS: dict[str, Solver] = {}


def equal_steps(num_steps: int, start: float = 1.0, end: float = 0.0) -> list[float]:
    return _linspace(start, end, num_steps + 1)


def noisy_steps(num_steps: int, start: float = 1.0, end: float = LAST_STOCHASTIC_TIME) -> list[float]:
    """num_steps - 1 equal steps; one without noise comes after them."""
    return _linspace(start, end, num_steps)


def solver(
    grid: Callable[[int, float, float], list[float]] = equal_steps, noisy: bool = False, adaptive: bool = False
) -> Callable[[Callable[..., Iterator[Tree]]], Solver]:
    def register(steps: Callable[..., Iterator[Tree]]) -> Solver:
        return SOLVERS.setdefault(steps.__name__, Solver(steps.__name__, steps, grid, noisy, adaptive))

    return register


@solver()
def euler(v: Field, x: Tree, times: Sequence[float]) -> Iterator[Tree]:
    for t, s in pairwise(times):
        x = _step(x, s - t, v(x, t, s))
        yield x


@solver()
def heun(v: Field, x: Tree, times: Sequence[float]) -> Iterator[Tree]:
    """Second order (trapezoid); the step with which a sampling reaches the data (t = 0) is Euler's, as REPA and JiT
    publish it. One step alone that begins after the noise is the method's own step, a trapezoid there too.
    """
    alone = len(times) == 2 and times[0] < 1
    for t, s in pairwise(times):
        slope = v(x, t, s)
        x = _trapezoid(v, x, t, s, slope) if s or alone else _step(x, s - t, slope)
        yield x


@solver()
def heun2(v: Field, x: Tree, times: Sequence[float]) -> Iterator[Tree]:
    """Second order (trapezoid), on every step."""
    for t, s in pairwise(times):
        x = _trapezoid(v, x, t, s, v(x, t, s))
        yield x


@solver()
def rk4(v: Field, x: Tree, times: Sequence[float]) -> Iterator[Tree]:
    """Fourth order, Kutta's 3/8 rule (torchdiffeq's "rk4")."""
    for t, s in pairwise(times):
        h = s - t
        a = v(x, t, s)
        b = v(_step(x, h / 3, a), t + h / 3, t)
        c = v(_step(x, h, each(lambda a, b: b - a / 3, a, b)), t + 2 * h / 3, t)
        d = v(_step(x, h, each(lambda a, b, c: a - b + c, a, b, c)), s, t)
        x = _step(x, h, each(lambda a, b, c, d: (a + 3 * (b + c) + d) / 8, a, b, c, d))
        yield x


@solver(adaptive=True)
def dopri5(v: Field, x: Tree, times: Sequence[float], *, atol: float = 1e-6, rtol: float = 1e-3) -> Iterator[Tree]:
    """Fifth order with error control (Dormand and Prince), by torchdiffeq; yields the state at the end alone.

    The last step is cut at the end, and no evaluation lies outside the times. Raises UserError where torchdiffeq is
    absent, and where the tolerance cannot be met.
    """
    names, start, end = list(leaves(x)), times[0], times[-1]
    ends = torch.tensor([start, end], dtype=torch.float64, device=next(iter(leaves(x).values())).device)

    def slope(t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        time = min(max(t.item(), end), start)  # the trial before the first step may lie beyond
        there = leaves(v(like(x, dict(zip(names, state, strict=True))), time, time))
        return tuple(there[name] for name in names)

    try:
        found = torchdiffeq().odeint(
            slope, tuple(leaves(x).values()), ends, atol=atol, rtol=rtol, method="dopri5", options={"step_t": ends[1:]}
        )
    except AssertionError as error:
        if not str(error).startswith(("underflow in dt", "non-finite values in state")):
            raise
        raise UserError(
            f"dopri5 cannot keep atol={atol}, rtol={rtol} ({error}); raise them, or use another sampler"
        ) from None
    yield like(x, {name: leaf[-1] for name, leaf in zip(names, found, strict=True)})


def sde_solver(step: Callable[[Reverse, Tree, float, float, Tree], Tree]) -> Solver:
    """Of a step from t to s with noise; a last one without comes after them. The defaults are REPA's (its diffusion 2t
    is 2w).
    """

    def steps(
        v: Field,
        x: Tree,
        times: Sequence[float],
        path: Path,
        noise: Draw,
        *,
        diffusion: Diffusion = "linear",
        diffusion_norm: float = 1.0,
        last_step: LastStep = "mean",
        last_step_size: float | None = None,
    ) -> Iterator[Tree]:
        reverse = Reverse(v, path, diffusion, diffusion_norm)
        for i, (t, s) in enumerate(pairwise(times)):
            x = step(reverse, x, t, s, noise(i))
            yield x
        if last_step != "none":
            yield reverse.last(x, times[-1], last_step, last_step_size)

    steps.__name__ = step.__name__
    return solver(noisy_steps, noisy=True)(steps)


@sde_solver
def sde(reverse: Reverse, x: Tree, t: float, s: float, noise: Tree) -> Tree:
    """Euler-Maruyama."""
    return _step(_step(x, s - t, reverse.drift(x, t, s)), reverse.spread(t, s), noise)


@sde_solver
def sde_heun(reverse: Reverse, x: Tree, t: float, s: float, noise: Tree) -> Tree:
    """Noise first, then a trapezoid of the drift from there."""
    x = _step(x, reverse.spread(t, s), noise)
    return _trapezoid(reverse.drift, x, t, s, reverse.drift(x, t, s))


# Euler on a mean velocity is exact in every step, so that one step may be enough
SOLVERS["mean_flow"] = replace(euler, name="mean_flow", follows="mean_velocity")
SOLVERS["ddpm"] = Solver("ddpm", ddpm.ddpm, ddpm.spaced_steps, noisy=True, follows="noise", draws=torch.float32)
SOLVERS["ddim"] = Solver("ddim", ddpm.ddim, ddpm.spaced_steps, follows="noise")

if TYPE_CHECKING:
    SolverName = str
else:
    SolverName = Literal[tuple(SOLVERS)]  # for the fields of configurations


def torchdiffeq() -> ModuleType:
    """The optional package. Raises UserError where it is absent."""
    try:
        import torchdiffeq
    except ImportError:
        raise UserError("sampler 'dopri5' needs torchdiffeq; run `pip install 'dit_fast[ode]'`") from None
    return torchdiffeq


def _step(x: Tree, length: float, slope: Tree) -> Tree:
    return each(lambda a, b: a + length * b, x, slope)


def _trapezoid(v: Field, x: Tree, t: float, s: float, slope: Tree) -> Tree:
    ahead = v(_step(x, s - t, slope), s, t)
    return _step(x, s - t, each(lambda a, b: (a + b) / 2, slope, ahead))


def _linspace(start: float, stop: float, count: int) -> list[float]:
    return torch.linspace(start, stop, count, dtype=torch.float64).tolist()
