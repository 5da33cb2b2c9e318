"""Flow matching with velocity prediction (SiT, arXiv 2401.08740): the model predicts v = dx_t/dt at one time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dit_fast.diffusion import SOLVERS, Path, time_sampler, velocity_error
from dit_fast.errors import ConfigError
from dit_fast.models import Backbone, Taps
from dit_fast.objectives.base import Context, Objective, noise_for
from dit_fast.ops import flow_error, flow_noised
from dit_fast.ops.flow import draws_noise_in_registers
from dit_fast.options import setting
from dit_fast.philox import Key
from dit_fast.tree import Tree, leaves, like


class Flow(Objective):
    """Mean squared error of the velocity of each leaf, at times drawn from one distribution."""

    name = "flow"
    solvers: ClassVar = {name: solver for name, solver in SOLVERS.items() if solver.times == 1}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Path from data (t = 0) to noise (t = 1) and the distribution of t."""

        name: ClassVar[str] = "flow"
        path: Literal["linear", "cosine"] = setting("linear", "Interpolation between latents and noise")
        time: Literal["uniform", "lognormal", "logit_normal"] = setting("uniform", "Distribution of t")
        time_mean: float = setting(0.0, "Mean before the sigmoid (logit_normal)", "[-100, 100]")
        time_std: float = setting(1.0, "Standard deviation before the sigmoid (logit_normal)", "(0, 100]")

    def __init__(self, config: Config, model: Backbone):
        """Raises ConfigError for a model of two times."""
        if model.times != 1:
            raise ConfigError("objective=flow needs a model of one time; set model.times=1, or objective=mean_flow")
        self.path = Path(config.path)
        self.times = time_sampler(config.time, config.path, config.time_mean, config.time_std)

    def run(
        self, model: Backbone, x: Tree, y: Tensor, key: Key, taps: Taps, batch: Mapping[str, Tensor], number: int
    ) -> Context:
        """As `Objective.run`. Where the fused ops run, the image's noise and target are never tensors."""
        t, clean = self.times.keyed(key.seed, key.position), leaves(x)
        draw = (t, key.position, key.seed, self.path.name)
        fused = {"image": clean["image"]} if draws_noise_in_registers(clean["image"]) else {}
        plain = {name: leaf for name, leaf in clean.items() if name not in fused}
        drawn, target = map(leaves, self.interpolate(plain, noise_for(plain, key), t))
        noised = like(x, {name: flow_noised(leaf, *draw) for name, leaf in fused.items()} | drawn)
        prediction = model(noised, t, y, taps)
        losses = {
            name: flow_error(leaf, fused[name], *draw) if name in fused else velocity_error(leaf, target[name])
            for name, leaf in leaves(prediction).items()
        }
        return Context(self, model, x, y, key, t, noised, prediction, losses, taps, batch, number)
