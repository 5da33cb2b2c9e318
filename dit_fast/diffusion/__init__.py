"""Paths, training times, the flow objective, guidance and solvers. Time runs from data (0) to noise (1)."""

from dit_fast.diffusion.flow import flow_loss, velocity_error
from dit_fast.diffusion.guidance import Guidance
from dit_fast.diffusion.paths import Path
from dit_fast.diffusion.samplers import initial_noise, sample
from dit_fast.diffusion.solvers import SOLVERS, Solver
from dit_fast.diffusion.times import TimeSampler, logit_normal, lognormal, time_sampler, uniform

__all__ = [
    "SOLVERS",
    "Guidance",
    "Path",
    "Solver",
    "TimeSampler",
    "flow_loss",
    "initial_noise",
    "logit_normal",
    "lognormal",
    "sample",
    "time_sampler",
    "uniform",
    "velocity_error",
]
