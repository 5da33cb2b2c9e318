"""Configuration of the objective."""

from dataclasses import dataclass
from typing import Literal

from dit_fast.options import setting


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Path from data (t = 0) to noise (t = 1) and the distribution of t."""

    path: Literal["linear", "cosine"] = setting("linear", "Interpolation between latents and noise")
    time: Literal["uniform", "lognormal", "logit_normal"] = setting("uniform", "Distribution of t")
    time_mean: float = setting(0.0, "Mean before the sigmoid (logit_normal)", "[-100, 100]")
    time_std: float = setting(1.0, "Standard deviation before the sigmoid (logit_normal)", "(0, 100]")
