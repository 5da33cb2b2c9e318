"""The reverse SDE of a velocity: dx = (v - w score) dt + sqrt(2 w) dW from t = 1 to 0, for any diffusion w(t) >= 0.

Source: SiT (arXiv 2401.08740), Sec. 2.4, and its transport code for the last step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dit_fast.diffusion.conversions import LARGEST, Diffusion, convert, diffusion_coefficient, finite_at
from dit_fast.diffusion.paths import Path
from dit_fast.errors import UserError
from dit_fast.tree import Tree, each

LastStep = Literal["mean", "euler", "tweedie", "none"]


@dataclass(frozen=True)
class Reverse:
    """Along the velocity v(x, t, s) of a path, with diffusion w of a form and norm. Raises UserError for a time at
    which score or diffusion are infinite."""

    v: Callable[[Tree, float, float], Tree]
    path: Path
    diffusion: Diffusion
    norm: float

    def drift(self, x: Tree, t: float, s: float) -> Tree:
        w = self.width(t)
        return each(lambda u, score: u - w * score, *self._both(x, t, s))

    def spread(self, t: float, s: float) -> float:
        """Standard deviation of the noise of a step from t to s."""
        return (2 * self.width(t) * (t - s)) ** 0.5

    def width(self, t: float) -> float:
        w = diffusion_coefficient(self.diffusion, t, self.path, self.norm).item()
        if not w < LARGEST:  # NaN too
            raise UserError(
                f"diffusion '{self.diffusion}' is infinite at t={t} on the {self.path.name} path; begin later, e.g. at "
                "0.999 (time_range, times)"
            )
        return w

    def last(self, x: Tree, t: float, how: LastStep, size: float | None) -> Tree:
        """The step without noise from t to t - size (None: to 0): "mean" along the drift, "euler" along v, "tweedie"
        the expected data."""
        size = t if size is None else size
        end = max(t - size, 0.0)
        if how in ("mean", "euler"):
            return each(lambda a, b: a - size * b, x, (self.drift if how == "mean" else self.v)(x, t, end))
        alpha, sigma = (float(c) for c in self.path.coefficients(t)[:2])
        if alpha < 1 / LARGEST:
            raise UserError(f"last_step='tweedie' divides by alpha, which is 0 at t={t}; give more steps")
        return each(lambda a, score: (a + sigma**2 * score) / alpha, x, self._both(x, t, end)[1])

    def _both(self, x: Tree, t: float, s: float) -> tuple[Tree, Tree]:
        """Velocity and score at t."""
        if not finite_at(t, self.path, "velocity", "score"):
            raise UserError(
                f"the score is infinite at t={t} on the {self.path.name} path; end the noisy steps before "
                "(time_range, times, last_step_size)"
            )
        velocity = self.v(x, t, s)

        def score(velocity: Tensor, x: Tensor) -> Tensor:
            return convert(velocity, x, t, self.path, "velocity", "score")

        return velocity, each(score, velocity, x)
