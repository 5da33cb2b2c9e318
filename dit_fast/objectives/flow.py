"""Flow matching (SiT, arXiv 2401.08740): the model predicts, at one time, v = dx_t/dt or what gives v."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_fast.diffusion import SOLVERS, Path, time_sampler, velocity_error
from dit_fast.diffusion.checks import check_batch, check_t_eps
from dit_fast.diffusion.conversions import T_EPS, Prediction, Weighting, error_weight, train_range, training_pair
from dit_fast.diffusion.guidance import described
from dit_fast.diffusion.paths import PathName
from dit_fast.diffusion.times import dimension_shift, shift_times
from dit_fast.errors import ConfigError, UserError
from dit_fast.models import Backbone, Output, Taps, split
from dit_fast.objectives.base import Context, Objective, noise_for
from dit_fast.ops import flow_error, flow_noised
from dit_fast.ops.draws import Key
from dit_fast.ops.flow import draws_noise_in_registers
from dit_fast.ops.flow_reference import PATHS
from dit_fast.options import setting
from dit_fast.tree import Tree, image, leaves, like


def flow_losses(
    model: Callable[[Tensor, Tensor, Tensor], Output],
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    path: Path | str = "linear",
    prediction: Prediction | str = "velocity",
    weighting: Weighting | str = "none",
    t_eps: float = T_EPS,
) -> Tensor:
    """w(t) times the mean over C, H, W of (model(x_t, t, y) - target)^2, [N] in at least float32.

    x, noise [N, C, H, W]; y int64 [N]; t [N] from 0 (data) to 1 (noise). The target is dx_t/dt, -noise / sigma, noise
    or x, by `prediction`. w: `conversions.error_weight`, for x with its t_eps; that of a velocity is 1 whatever the
    weighting, as in SiT's code. Infinite outside of `conversions.train_range`. Raises UserError as
    `check_batch`, for shapes, for unknown names and for a t_eps out of range or without effect.
    """
    check_batch(model, x, y, t, path, prediction)
    check_t_eps(t_eps, prediction == "x" and weighting != "none")
    x_t, target = training_pair(x, noise, t, path, prediction)
    output, _ = split(model(x_t, t, y))
    if not isinstance(output, Tensor) or output.shape != x.shape:
        raise UserError(f"the model returned {described(output)} for {described(x_t)}; it must be a {prediction}")
    error = velocity_error(output, target)
    return error * error_weight(t.to(error.dtype), path, prediction, weighting, t_eps)


def velocity_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine over channels of two velocities [N, C, ...], averaged over what follows; [N] in at least float32.

    Source: LightningDiT (arXiv 2501.01423), whose loss adds it to the squared error. Raises UserError for two shapes.
    """
    if prediction.shape != target.shape or prediction.dim() < 2:
        raise UserError(
            f"velocity_cosine needs two velocities [N, C, H, W], not {list(prediction.shape)} and {list(target.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return 1 - F.cosine_similarity(prediction.to(wide), target.to(wide), dim=1).reshape(len(target), -1).mean(1)


class Flow(Objective):
    """Mean squared error of the prediction of each leaf, at times drawn from one distribution.

    With cosine_weight the image's loss is that and `velocity_cosine` with this weight, and both are logged.

    A `Context` has as prediction what the model gave and as target what that is compared with: velocity, score, noise
    or clean data.
    """

    name = "flow"
    title = "flow matching"
    solvers: ClassVar = {name: solver for name, solver in SOLVERS.items() if solver.follows == "velocity"}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Path from data (t = 0) to noise (t = 1), what is predicted, and the distribution of t."""

        name: ClassVar[str] = "flow"
        path: PathName = setting("linear", "Interpolation between latents and noise")
        prediction: Prediction = setting("velocity", "What the model gives; velocities of samplers are made from it")
        weighting: Weighting = setting("none", "Weight over t of a score's, a noise's or x's error")
        t_eps: float = setting(T_EPS, "Least t by which a prediction of x is turned into a velocity", "(0, 1)")
        cosine_weight: float = setting(0.0, "Weight of 1 - cosine over channels of the image's velocity", "[0, 1e6]")
        time: Literal["uniform", "lognormal", "logit_normal"] = setting("uniform", "Distribution of t")
        time_mean: float = setting(0.0, "Mean before the sigmoid (logit_normal)", "[-100, 100]")
        time_std: float = setting(1.0, "Standard deviation before the sigmoid (logit_normal)", "(0, 100]")
        time_shift: float = setting(
            1.0, "Shift s of t to s t / (1 + (s - 1) t); 0 = by dimension, sqrt(C H W / 4096)", "[0, 1e6]"
        )

        def __post_init__(self) -> None:
            if self.prediction == "velocity" and self.weighting != "none":
                raise ConfigError(
                    f"objective.weighting={self.weighting} is for the errors of a score, of noise or of x; that of a "
                    "velocity has no weight. Set objective.weighting=none, or another objective.prediction"
                )
            if self.prediction != "velocity" and self.cosine_weight:
                raise ConfigError(
                    f"objective.cosine_weight={self.cosine_weight} is for a velocity, not for objective.prediction="
                    f"{self.prediction}; set objective.cosine_weight=0"
                )
            if self.prediction != "x" and self.t_eps != T_EPS:
                raise ConfigError(
                    f"objective.t_eps={self.t_eps} is for a prediction of x, not for objective.prediction="
                    f"{self.prediction}; set objective.t_eps={T_EPS}, or objective.prediction=x"
                )
            if self.time != "logit_normal" and (self.time_mean, self.time_std) != (0.0, 1.0):
                raise ConfigError(
                    f"objective.time_mean={self.time_mean} and time_std={self.time_std} are of objective.time="
                    f"logit_normal, not of {self.time}; set objective.time_mean=0 objective.time_std=1, or that time"
                )
            if self.path == "vp" and self.time == "lognormal":
                raise ConfigError(
                    "objective.time=lognormal is published for the paths linear and cosine, not for vp; set "
                    "objective.time=uniform"
                )

    def __init__(self, config: Config, model: Backbone):
        """Raises ConfigError for a model of two times, and for one that learns a variance."""
        self.refuse_variance(model)
        if model.times != 1:
            raise ConfigError("objective=flow needs a model of one time; set model.times=1, or objective=mean_flow")
        self.config, self.path = config, Path(config.path)
        self.prediction, self.t_eps = config.prediction, config.t_eps
        self.times = time_sampler(config.time, config.path, config.time_mean, config.time_std)
        self.time_shift = config.time_shift or dimension_shift(model.shapes["image"])
        self.fusible = self.prediction == "velocity" and self.path.name in PATHS and not config.cosine_weight

    def run(
        self, model: Backbone, x: Tree, y: Tensor, key: Key, taps: Taps, batch: Mapping[str, Tensor], number: int
    ) -> Context:
        """As `Objective.run`. Where the fused ops run, the image's noise and target are never tensors."""
        t, clean = self.draw_times(key), leaves(x)
        draw = (t, key.position, key.seed, self.path.name)
        fused = {"image": clean["image"]} if self.fusible and draws_noise_in_registers(clean["image"]) else {}
        plain = {name: leaf for name, leaf in clean.items() if name not in fused}
        drawn, target = map(leaves, self.interpolate(plain, noise_for(plain, key), t))
        noised = like(x, {name: flow_noised(leaf, *draw) for name, leaf in fused.items()} | drawn)
        prediction, second = split(model(noised, t, y, taps))
        predicted = leaves(prediction)
        losses = {name: flow_error(predicted[name], leaf, *draw) for name, leaf in fused.items()}
        losses |= self.errors({name: predicted[name] for name in plain}, target, t)
        logs = {}
        if self.config.cosine_weight:
            error, cosine = losses["image"], velocity_cosine(image(prediction), target["image"])
            losses["image"] = error + self.config.cosine_weight * cosine
            logs = {"flow/squared_error": error.mean(), "flow/cosine": cosine.mean()}
        return Context(self, model, x, y, key, t, noised, prediction, losses, taps, batch, number, logs, second)

    def errors(self, prediction: Tree, target: Tree, t: Tensor) -> dict[str, Tensor]:
        errors = super().errors(prediction, target, t)
        if self.prediction == "velocity":  # whose weight is 1
            return errors
        weight = error_weight(t, self.path, self.prediction, self.config.weighting, self.t_eps)
        return {name: error * weight for name, error in errors.items()}

    def draw_times(self, key: Key) -> Tensor:
        """t [N], keyed and shifted; where the published range of training is not [0, 1], it is then shrunk to that."""
        t, (noisy, clean) = self.times.keyed(key), train_range(self.path, self.prediction)
        t = t if self.time_shift == 1 else shift_times(t, self.time_shift)
        return t if (noisy, clean) == (1, 0) else clean + (noisy - clean) * t
