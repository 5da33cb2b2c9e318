"""Configurations of the model and of the objective."""

from dataclasses import dataclass
from typing import Literal

from dit_fast.options import setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer."""

    name: str = setting("SiT-XL/2", "Size and patch size: SiT-Nano/2 or SiT-{S, B, L, XL}/{2, 4, 8}")
    input_size: int = setting(0, "Latent height = width; 0 = as the data set says", "[0, 4096]")
    in_channels: int = setting(0, "Latent channels; 0 = as the data set says", "[0, 4096]")
    num_classes: int = setting(0, "Classes of the label table; 0 = as the data set says", "[0, 1e7]")
    skip_wiring: Literal["off", "input", "output"] = setting("input", "Long skips: none, as in the paper, as published")
    qk_norm: bool = setting(False, "Normalise queries and keys per head")
    label_dropout: float = setting(0.1, "Share of labels replaced by the null label", "[0, 1)")
    residual_dtype: Literal["fp32", "autocast"] = setting("fp32", "Type of the residual stream under bf16")
    attention: Literal["auto", "sdpa", "flash", "math"] = setting("auto", "Implementation of attention", resumes=True)
    checkpoint_blocks: bool = setting(False, "Recompute blocks in the backward pass to save memory", resumes=True)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Path from data (t = 0) to noise (t = 1) and the distribution of t."""

    path: Literal["linear", "cosine"] = setting("linear", "Interpolation between latents and noise")
    time: Literal["uniform", "lognormal", "logit_normal"] = setting("uniform", "Distribution of t")
    time_mean: float = setting(0.0, "Mean before the sigmoid (logit_normal)", "[-100, 100]")
    time_std: float = setting(1.0, "Standard deviation before the sigmoid (logit_normal)", "(0, 100]")
