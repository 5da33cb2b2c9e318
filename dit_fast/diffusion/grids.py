"""The times of a sampling, from noise to data, out of what the caller gives and what the published samplers take."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dit_fast.diffusion.conversions import Prediction, field_range
from dit_fast.diffusion.guidance import is_number
from dit_fast.diffusion.paths import Path
from dit_fast.diffusion.solvers import LAST_STOCHASTIC_TIME, Solver
from dit_fast.diffusion.times import check_shift, shift_times
from dit_fast.errors import UserError

ROUNDING = 1e-6  # of 1 - t in float32: so far beyond [0, 1] a time is taken for the end


def time_grid(
    solver: Solver,
    num_steps: int,
    path: Path,
    prediction: Prediction,
    options: Mapping[str, object],
    time_range: Sequence[float] | None = None,
    times: Sequence[float] | Tensor | None = None,
    time_shift: float | None = None,
) -> list[float]:
    """float64 times (or whole steps), strictly descending. options: those of the solver, checked, as far as they were
    given.

    times: these themselves. Otherwise `solver.grid` from the noisy to the clean end of time_range; by default of where
    the velocity is finite, for an SDE to where its last step begins. time_shift: the grid's inner times are those of
    equal steps under `shift_times`; the ends stay. Raises UserError for what does not fit.
    """
    if time_shift is not None:
        check_shift(time_shift)
    if solver.follows == "noise":
        for name, value in (("times", times), ("time_range", time_range), ("time_shift", time_shift)):
            if value is not None:
                raise UserError(f"sampler '{solver.name}' takes num_steps of the 1000 whole steps; drop {name}=")
        return solver.grid(num_steps)
    if times is not None:
        for name, other in (("time_range", time_range), ("time_shift", time_shift)):
            if other is not None:
                raise UserError(f"times= are the times themselves; drop {name}=")
        grid = check_times("times", times)
        if solver.adaptive and len(grid) > 2:
            raise UserError(f"sampler '{solver.name}' chooses its steps between two times; give times=(from, to)")
    else:
        if solver.adaptive and time_shift is not None:
            raise UserError(f"sampler '{solver.name}' chooses its steps itself; drop time_shift=")
        start, end = default_range(solver, path, prediction, options) if time_range is None else _pair(time_range)
        if not start > end:
            raise UserError(f"noisy steps from t={start} to {end} do not go down; last_step_size must be below {start}")
        grid = solver.grid(num_steps, start, end)
        if time_shift is not None:
            ends = shift_times(torch.tensor([start, end], dtype=torch.float64), 1 / time_shift).tolist()
            inner = torch.tensor(solver.grid(num_steps, *ends)[1:-1], dtype=torch.float64)
            grid = [grid[0], *shift_times(inner, time_shift).tolist(), *grid[1:][-1:]]
    if solver.noisy:
        _check_last_step(solver, grid, time_range is not None, options)
    return grid


def default_range(
    solver: Solver, path: Path, prediction: Prediction, options: Mapping[str, object]
) -> tuple[float, float]:
    """(from, to): as published; a diffusion that is infinite at t = 1 begins where other predictions do."""
    start, end = field_range(path, prediction)
    if options.get("diffusion") == "sbdm":
        start = field_range(path, "score")[0]
    if solver.noisy and options.get("last_step") != "none":
        size = options.get("last_step_size")
        end = LAST_STOCHASTIC_TIME if size is None else float(size)  # type: ignore[arg-type]
    return start, end


def check_times(name: str, times: object) -> list[float]:
    """At least two times in [0, 1], strictly descending, as floats. Raises UserError."""
    given = times.tolist() if hasattr(times, "tolist") else times  # tensors and arrays
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
        raise UserError(f"{name} must be two or more times, not {times!r}")
    for time in given:
        if not is_number(time) or not -ROUNDING <= time <= 1 + ROUNDING:
            raise UserError(f"{name} holds {time!r}; a time lies in [0, 1] (0 is data, 1 is noise)")
    clipped = [min(max(float(time), 0.0), 1.0) for time in given]
    for before, after in pairwise(clipped):
        if not before > after:
            raise UserError(f"{name} must descend, from noise to data, and {after} follows {before}")
    return clipped


def _pair(time_range: Sequence[float]) -> tuple[float, float]:
    given = check_times("time_range", time_range)
    if len(given) != 2:
        raise UserError(f"time_range must be two times, (from, to), not {time_range!r}")
    return given[0], given[1]


def check_range(time_range: Sequence[float] | None, time_shift: float | None) -> None:
    """Raises UserError for a pair that is none, or a shift that is no finite number above 0."""
    if time_shift is not None:
        check_shift(time_shift)
    if time_range is not None:
        _pair(time_range)


def _check_last_step(solver: Solver, grid: list[float], ranged: bool, options: Mapping[str, object]) -> None:
    how, size = options.get("last_step", "mean"), options.get("last_step_size")
    if len(grid) < 2 and (ranged or how == "none" or size is not None):
        raise UserError(f"num_steps=1 of sampler '{solver.name}' is its last step alone; give 2 or more")
    if size is not None and how != "none" and size > grid[-1] + ROUNDING:  # type: ignore[operator]
        raise UserError(f"last_step_size={size} leads beyond the data from t={grid[-1]}, where the noisy steps end")
