"""Paths, training times, the flow objective, guidance and samplers. Time runs from data (0) to noise (1)."""

from dit_fast.diffusion.flow import flow_loss, velocity_error
from dit_fast.diffusion.guidance import Guidance
from dit_fast.diffusion.paths import Path
from dit_fast.diffusion.samplers import SAMPLERS, initial_noise, sample
from dit_fast.diffusion.times import TimeSampler, logit_normal, lognormal, time_sampler, uniform

__all__ = [
    "SAMPLERS",
    "Guidance",
    "Path",
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
