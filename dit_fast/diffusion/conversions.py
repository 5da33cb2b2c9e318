"""What a network may predict at x_t = alpha x + sigma e, turned into one another; weights, diffusion, ranges of time.

With D = alpha sigma' - alpha' sigma, which is positive on every path,

    v = alpha' x + sigma' e = (alpha' x_t + D e) / alpha = (sigma' x_t - D x) / sigma,        score = -e / sigma.

Source: SiT (arXiv 2401.08740) and its transport code. Time runs from data (0) to noise (1): a velocity is minus the
published one, a score or a noise is the published one.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dit_fast.diffusion.paths import Path, along, as_path
from dit_fast.errors import UserError
from dit_fast.options import check_choice

Prediction = Literal["velocity", "score", "noise", "x"]
Weighting = Literal["none", "velocity", "likelihood"]
Diffusion = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"]
T_EPS = 0.05  # of JiT
LARGEST = 1e9  # of what stands for a number that the path makes infinite, which rounding may hide


def convert(
    value: Tensor,
    x_t: Tensor,
    t: Tensor | float,
    path: Path | str = "linear",
    source: Prediction | str = "velocity",
    target: Prediction | str = "velocity",
    t_eps: float = 0.0,
) -> Tensor:
    """The `target` at x_t [N, ...] that belongs to the `source` `value` of the same shape, at t [N] or at one time.

    In the common dtype of value and x_t, at least float32; coefficients are computed in the widest dtype given.
    t_eps: between x and velocity the coefficients are those at max(t, t_eps), on the linear path v = (x_t - x) / max(t,
    t_eps) (JiT, arXiv 2511.13720). Infinite where the path makes it so: `field_range`. Raises UserError for an unknown
    path, source or target, for shapes that do not fit, and for a t_eps that is no time.
    """
    path = as_path(path)
    for name, what in (("source", source), ("target", target)):
        check_choice(name, what, Prediction)
    if value.shape != x_t.shape or (isinstance(t, Tensor) and t.dim() and t.shape != x_t.shape[:1]):
        shapes = f"{list(value.shape)}, {list(x_t.shape)}, {list(t.shape) if isinstance(t, Tensor) else t}"
        raise UserError(f"convert needs value and x_t of one shape [N, ...] and t [N] or one time, not {shapes}")
    dtype = torch.promote_types(torch.promote_types(value.dtype, x_t.dtype), torch.float32)
    value, x_t = value.to(dtype), x_t.to(dtype)
    if source == target:
        return value
    times = _beside(t, x_t) if isinstance(t, Tensor) else t
    c = _terms(path, times, dtype)
    if {source, target} == {"score", "noise"}:
        return value / -c.sigma if source == "noise" else value * -c.sigma
    if target == "x" and source != "velocity":  # without sigma', which is infinite at t = 0 on vp, where x is x_t
        return (x_t - c.sigma * (value if source == "noise" else value * -c.sigma)) / c.alpha
    late = c
    if t_eps and "x" in (source, target):
        late = _terms(path, _late(times, t_eps), dtype)
    velocity = value
    if source == "noise":
        velocity = (c.d_alpha * x_t + c.d * value) / c.alpha
    elif source == "score":
        velocity = (c.d_alpha * x_t - c.sigma_d * value) / c.alpha
    elif source == "x":
        velocity = (late.d_sigma * x_t - late.d * value) / late.sigma
    if target == "noise":
        return (c.alpha * velocity - c.d_alpha * x_t) / c.d
    if target == "score":  # written as REPA's sampler does, whose bits are kept
        ratio = c.alpha / c.d_alpha
        return (ratio * velocity - x_t) / (1 if path.name == "vp" else c.sigma**2 - ratio * c.d_sigma * c.sigma)
    if target == "x":
        return (late.d_sigma * x_t - late.sigma * velocity) / late.d
    return velocity


def finite_at(
    t: float, path: Path | str, source: Prediction | str, target: Prediction | str, t_eps: float = 0.0
) -> bool:
    """Whether `convert` has finite coefficients at one time."""
    value, x_t = torch.eye(2, dtype=torch.float64)
    return bool((convert(value, x_t, t, path, source, target, t_eps).abs() < LARGEST).all())


def training_pair(
    x: Tensor, noise: Tensor, t: Tensor, path: Path | str = "linear", prediction: Prediction | str = "velocity"
) -> tuple[Tensor, Tensor]:
    """(x_t, what the prediction is compared with), each [N, ...], for data and noise of that shape and t [N]."""
    path = as_path(path)
    check_choice("prediction", prediction, Prediction)
    x_t, velocity = path.interpolate(x, noise, t)
    if prediction == "score":
        sigma = _terms(path, _beside(t, x_t), x_t.dtype).sigma
        return x_t, -noise / sigma
    return x_t, {"velocity": velocity, "noise": noise, "x": x}[prediction]


def error_weight(
    t: Tensor,
    path: Path | str = "linear",
    prediction: Prediction | str = "velocity",
    weighting: Weighting | str = "none",
    t_eps: float = T_EPS,
) -> Tensor:
    """w(t) [N] of a prediction's squared error, in t's dtype.

    "none": 1; sigma^2 for a score, whose error is then that of the noise. "velocity": what makes it the error of the
    velocity, (D / alpha)^2 for noise, (sigma D / alpha)^2 for a score, (D / sigma)^2 for x with t at least t_eps.
    "likelihood": the latter divided by sigma D / alpha. A velocity has 1, whatever the weighting, as in SiT's code.
    Raises UserError for unknown names, and for a t_eps that is no time.
    """
    path = as_path(path)
    check_choice("prediction", prediction, Prediction)
    check_choice("weighting", weighting, Weighting)
    if prediction == "velocity" or (weighting == "none" and prediction != "score"):
        return torch.ones_like(t)
    c = _terms(path, _late(t, t_eps) if prediction == "x" else t, t.dtype)
    if weighting == "none":
        return c.sigma.square()
    gain = {"noise": c.d / c.alpha, "score": c.sigma_d / c.alpha, "x": c.d / c.sigma}[prediction]
    return gain.square() if weighting == "velocity" else gain.square() * c.alpha / c.sigma_d


def diffusion_coefficient(
    form: Diffusion | str, t: Tensor | float, path: Path | str = "linear", norm: float = 1.0
) -> Tensor:
    """w(t) of dx = (v - w score) dt + sqrt(2 w) dW, of t's shape: [N], or 0-d float64 for a float.

    With c = norm: "constant" c; "sbdm" c sigma D / alpha, that of the forward process, infinite at t = 1 on linear and
    cosine; "sigma" c sigma; "linear" c t; "decreasing" (1 - c cos(pi t))^2 / 4; "increasing-decreasing" c sin(pi t)^2.
    Raises UserError for an unknown form or path.
    """
    check_choice("diffusion", form, Diffusion)
    path = as_path(path)
    times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    if form == "constant":
        return torch.full_like(times, norm)
    if form == "linear":
        return norm * times
    if form == "decreasing":
        return (1 - norm * torch.cos(torch.pi * times)).square() / 4
    if form == "increasing-decreasing":
        return norm * torch.sin(torch.pi * times).square()
    c = _terms(path, times, times.dtype)
    return norm * (c.sigma if form == "sigma" else c.sigma_d / c.alpha)


def field_range(path: Path | str, prediction: Prediction | str) -> tuple[float, float]:
    """(noisy end, clean end) of sampling: where a velocity made from such a prediction is finite, as published.

    x has (1, 0): with a t_eps it is finite everywhere.
    """
    return _range(path, prediction, 1e-3)


def train_range(path: Path | str, prediction: Prediction | str) -> tuple[float, float]:
    """(noisy end, clean end) of the times at which such a prediction is trained, as published; x has (1, 0)."""
    return _range(path, prediction, 1e-5)


def _range(path: Path | str, prediction: Prediction | str, vp_end: float) -> tuple[float, float]:
    path = as_path(path)
    check_choice("prediction", prediction, Prediction)
    if prediction == "x":
        return 1.0, 0.0
    if path.name == "vp":  # sigma' is infinite at 0; alpha is positive at 1
        return 1.0, vp_end
    return (1.0, 0.0) if prediction == "velocity" else (0.999, 0.001)


def _late(t: Tensor | float, t_eps: float) -> Tensor | float:
    """t, at least t_eps. Raises UserError for one that is no time below 1."""
    if not 0 <= t_eps < 1:
        raise UserError(f"t_eps={t_eps} must be a time in [0, 1)")
    return t.clamp(min=t_eps) if isinstance(t, Tensor) else max(t, t_eps)


def _beside(t: Tensor, like: Tensor) -> Tensor:
    """t [N] as [N, 1, ...] beside `like` [N, ...], 0-d as it is; in the wider of the two dtypes."""
    wide = t.to(torch.promote_types(t.dtype, like.dtype))
    return along(wide, like) if t.dim() else wide


class _Terms(NamedTuple):
    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    d: Tensor
    sigma_d: Tensor  # sigma D


def _terms(path: Path, t: Tensor | float, dtype: torch.dtype) -> _Terms:
    """Of t's shape. A float goes through the coefficients of floats, which differ from a tensor's in the last bit."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    d = alpha * d_sigma - d_alpha * sigma
    sigma_d = -d_alpha if path.name == "vp" else sigma * d  # the same, and finite at t = 0 too
    parts = (alpha, sigma, d_alpha, d_sigma, d, sigma_d)
    device = t.device if isinstance(t, Tensor) else None  # 0-d ones go with any
    return _Terms(*(torch.as_tensor(part, dtype=dtype, device=device) for part in parts))
