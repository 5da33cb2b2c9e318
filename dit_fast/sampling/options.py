"""What to draw: the one place of sampling options, of their defaults and of what they mean."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dit_fast.checkpoint.run import LoadedRun
from dit_fast.data import LatentDataset
from dit_fast.diffusion import SOLVERS, Guidance, Solver, sample
from dit_fast.diffusion.conversions import Diffusion
from dit_fast.diffusion.grids import check_range, time_grid
from dit_fast.diffusion.guidance import Bounds, Channels, Decision, check_internal, is_number
from dit_fast.diffusion.reverse import LastStep
from dit_fast.diffusion.samplers import MOST_ROWS, check_options, check_refresh, check_whole
from dit_fast.diffusion.solvers import SolverName, torchdiffeq
from dit_fast.errors import UserError
from dit_fast.models import guidance_conditions
from dit_fast.models.base import GUIDANCE
from dit_fast.options import check_choice, setting
from dit_fast.philox import Stream, uint32
from dit_fast.tree import Tree

SHOWN_CLASSES = 10
PER_CLASS = 8
MOST_IMAGES = 1_000_000  # of a class
MOST_IN_ALL = 10**9  # names of nine digits
GUIDED = 2.5  # scale of the guidance where none is asked for; a mean velocity has it in its training target
STEPS = {"mean_flow": 1, "ddpm": 250}  # as published; otherwise
FEW = 20
USUAL = "heun"  # where the objective has it
OWN = tuple(dict.fromkeys(name for solver in SOLVERS.values() for name in solver.options))

Weights = Literal["ema", "model"]
Precision = Literal["fp32", "bf16"]
Labels = Literal["balanced", "random"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Image k depends on the seed, on k and on its class alone, which is a function of the seed and k (`labels_of`).

    Raises UserError naming a value that cannot be meant.
    """

    classes: tuple[int, ...] = setting((), "labels, e.g. 0,3,7 (default: the first ten; with --count all)")
    per_class: int | None = setting(None, f"images of each class (default: {PER_CLASS})")
    count: int | None = setting(None, "images in all, instead of per class")
    labels: Labels = setting("balanced", "of image k: class k mod their number, or one at random by seed and k")
    cfg_scale: float | None = setting(None, "guidance; 1 = off, 0 = no label (default: 2.5 if trained for it)")
    guidance_low: float = setting(0.0, "guide only for t from here ...")
    guidance_high: float = setting(1.0, "... to here (1 is pure noise)")
    guidance_bounds: Bounds = setting("inclusive", "whether those two times are guided themselves")
    heun_guidance: Decision = setting("first", "which evaluation of a step decides whether it is guided")
    cfg_channels: Channels | None = setting(None, "guided channels (default: what the model's own sampler guides)")
    class_token_cfg_scale: float | None = setting(None, "guidance of the class token (default: the image's)")
    omega: float | None = setting(
        None, "guidance that the model is told; 1 = none (default: 2.5, where it is told any)"
    )
    t_min: float | None = setting(None, "tell it guidance for t from here ... (default: 0)")
    t_max: float | None = setting(None, "... to here (default: 1)")
    ig_scale: float = setting(1.0, "internal guidance, for a model with an auxiliary output; 1 = off")
    ig_low: float = setting(0.0, "internal guidance only for t from here ...")
    ig_high: float = setting(1.0, "... to here, both included")
    sampler: SolverName | None = setting(None, "solver (default: heun; mean_flow for a mean velocity, ddpm for DDPM)")
    num_steps: int | None = setting(None, "sampling steps (default: 20; mean_flow 1, ddpm 250; dopri5 takes its own)")
    time_range: tuple[float, float] | None = setting(
        None, "times of the first and the last step, e.g. 0.999,0.001 (default: where the velocity is finite)"
    )
    time_shift: float | None = setting(
        None, "equal steps of u with t = s u / (1 + (s - 1) u) (default: the run's shift)"
    )
    state_refresh: int | None = setting(None, "run DDT's encoder in every so many-th step (default: in all)")
    diffusion: Diffusion | None = setting(None, "form of an SDE's diffusion (default: linear, as REPA)")
    diffusion_norm: float | None = setting(None, "its factor (default: 1)")
    last_step: LastStep | None = setting(None, "an SDE's step without noise (default: mean)")
    last_step_size: float | None = setting(None, "its length (default: 0.04, or what --time-range leaves)")
    atol: float | None = setting(None, "absolute tolerance of dopri5 (default: 1e-6)")
    rtol: float | None = setting(None, "relative tolerance of dopri5 (default: 1e-3)")
    seed: int = setting(0, "image k depends on the seed, on k and on its class")
    autoencoder: str | None = setting(
        None, "decode with pca:FILE, diffusers:DIR, taef2:DIR or features:FILE (default: what made the latents)"
    )
    weights: Weights = setting("ema", "moving average or raw weights")
    precision: Precision = setting("fp32", "bf16: autocast in the model")
    chunk: int = setting(16, "images computed together; equal values, equal bytes")

    def __post_init__(self) -> None:
        for name, most in (("per_class", MOST_IMAGES), ("count", MOST_IN_ALL)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, most)
        if self.count is not None and self.per_class is not None:
            raise UserError("per_class and count are both given; drop one")
        check_choice("labels", self.labels, Labels)
        if self.labels == "random" and self.count is None:
            raise UserError("labels=random draws no fixed number of each class; say how many images in all with count")
        check_whole("chunk (--batch)", self.chunk, 1, MOST_ROWS)
        steps, own = FEW if self.num_steps is None else self.num_steps, self._own_options() if self.sampler else {}
        check_options(self.sampler or "euler", steps, self.chunk, self.seed, own)
        check_range(self.time_range, self.time_shift)
        check_refresh(self.state_refresh, self.sampler or "euler")
        if self.sampler == "dopri5":
            torchdiffeq()
        scale, channels = 1.0 if self.cfg_scale is None else self.cfg_scale, self.cfg_channels or "all"
        Guidance(
            scale,
            self.guidance_low,
            self.guidance_high,
            channels,
            self.class_token_cfg_scale,
            self.guidance_bounds,
            self.heun_guidance,
            self.ig_scale,
            self.ig_low,
            self.ig_high,
        )
        if self.omega is not None and not (is_number(self.omega) and 0 < self.omega < math.inf):
            raise UserError(f"omega={self.omega!r} must be a finite number above 0; 1 = no guidance")
        for name in ("t_min", "t_max"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= 1):
                raise UserError(f"{name}={value!r} must be a time in [0, 1] (0 is data, 1 is noise)")
        if (self.t_min or 0) > (1 if self.t_max is None else self.t_max):
            raise UserError(f"t_min={self.t_min} lies above t_max={self.t_max}; swap them")
        for name, kind in (("weights", Weights), ("precision", Precision)):
            check_choice(name, getattr(self, name), kind)
        if len(set(self.classes)) < len(self.classes):
            twice = next(label for label in self.classes if self.classes.count(label) > 1)
            raise UserError(f"class {twice} is listed twice; raise per_class for more images of each class")

    @property
    def total(self) -> int:
        """Number of images, of resolved options."""
        return (self.per_class or 0) * len(self.classes) if self.count is None else self.count

    def labels_of(self, index: Tensor) -> Tensor:
        """Labels int64 [N] of the images of these numbers (int64 [N], on any device), of resolved options.

        They do not depend on how many are drawn. Random ones are uniform over the classes, by Philox of (seed, number).
        """
        count = len(self.classes)
        if self.labels == "random":
            place = uint32(self.seed, index, Stream.SAMPLED_LABEL, 1)[:, 0] * count >> 32
        else:
            place = index % count
        return torch.tensor(self.classes, dtype=torch.int64, device=index.device)[place]

    def resolved(self, run: LoadedRun, dataset: LatentDataset) -> "SampleOptions":
        """The same with what run and data set decide filled in. Raises UserError for a class that is not
        there, for a sampler that does not fit the objective, and for times and options that do not fit the sampler.
        """
        model, solvers = run.model, run.objective.solvers
        sampler = self.sampler or next(name for name in (USUAL, *solvers) if name in solvers)
        check_solver(sampler, solvers)
        check_told(model.guidance_condition, {name: getattr(self, name) for name in GUIDANCE})
        check_internal(self.ig_scale, model)
        mean = model.times == 2
        guided = GUIDED if model.null_label >= 0 and not mean else 1.0
        steps = STEPS.get(sampler, FEW) if self.num_steps is None else self.num_steps
        shift = None if run.objective.time_shift == 1 else run.objective.time_shift
        chosen = replace(
            self,
            classes=check_classes(self.classes, dataset, None if self.count else SHOWN_CLASSES),
            per_class=PER_CLASS if self.count is None and self.per_class is None else self.per_class,
            sampler=sampler,
            num_steps=steps,
            cfg_scale=guided if self.cfg_scale is None else self.cfg_scale,
            cfg_channels=self.cfg_channels or model.cfg_channels,
            time_shift=self.time_shift if self.time_shift is not None or solvers[sampler].adaptive else shift,
        )
        if model.guidance_condition:
            told: dict[str, Any] = {"omega": GUIDED, "t_min": 0.0, "t_max": 1.0}
            told |= {name: getattr(self, name) for name in told if getattr(self, name) is not None}
            chosen = replace(chosen, **told)
        path, prediction, own = run.objective.path, run.objective.prediction, chosen._own_options()
        time_grid(solvers[sampler], steps, path, prediction, own, self.time_range, time_shift=chosen.time_shift)
        return chosen

    def _own_options(self) -> dict[str, Any]:
        """Of solvers, by name, as far as they were given."""
        return {name: getattr(self, name) for name in OWN if getattr(self, name) is not None}

    def conditions(self, labels: Tensor) -> Tree:
        """What a model is given of resolved options beside x and t, for labels [N]."""
        told = [getattr(self, name) for name in GUIDANCE]
        return labels if self.omega is None else guidance_conditions(labels, *told)

    def arguments(self) -> dict[str, Any]:
        """Resolved options that are keywords of `sample`, by name."""
        keywords = inspect.signature(sample).parameters
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in keywords}

    def text(self, seed: bool = True) -> str:
        """One line for captions: what was computed by resolved options. seed: name it too."""
        assert self.sampler, "resolve the options first"
        assert self.cfg_scale is not None, "resolve the options first"
        parts = [self.sampler, *self._steps(SOLVERS[self.sampler])]
        if self.omega is not None and self.t_min is not None and self.t_max is not None:
            whole = (self.t_min, self.t_max) == (0, 1)
            parts.append(f"omega {_exact(self.omega)}")
            parts[-1] += "" if whole else f" for t in [{_exact(self.t_min)}, {_exact(self.t_max)}]"
        parts.append(f"guidance {_exact(self.cfg_scale)}")
        if self.class_token_cfg_scale is not None:
            parts[-1] += f" ({_exact(self.class_token_cfg_scale)} of the class token)"
        open_ends = self.guidance_bounds == "exclusive"
        if self.cfg_scale != 1 and ((self.guidance_low, self.guidance_high) != (0, 1) or open_ends):
            left, right = "(" if open_ends else "[", ")" if open_ends and self.guidance_high < 1 else "]"
            parts[-1] += f" for t in {left}{_exact(self.guidance_low)}, {_exact(self.guidance_high)}{right}"
            parts[-1] += " of each evaluation" * (self.heun_guidance == "each")
        if self.cfg_scale != 1 and self.cfg_channels == "first_three":
            parts[-1] += " on channels 0 to 2"
        if self.ig_scale != 1:
            parts.append(f"internal guidance {_exact(self.ig_scale)}")
            if (self.ig_low, self.ig_high) != (0, 1):
                parts[-1] += f" for t in [{_exact(self.ig_low)}, {_exact(self.ig_high)}]"
        parts += [f"seed {self.seed}"] * seed
        parts += ["random labels"] * (self.labels == "random")
        parts += [] if self.autoencoder is None else [f"decoded by {self.autoencoder}"]
        return ", ".join([*parts, *["raw weights"] * (self.weights == "model"), *["bf16"] * (self.precision == "bf16")])

    def _steps(self, solver: Solver) -> list[str]:
        """What differs from the sampler's defaults, after the number of steps or the tolerances."""
        given = self._own_options()
        own = {**solver.options, **given}
        parts = [f"atol {own['atol']:g}", f"rtol {own['rtol']:g}"] if solver.adaptive else [f"{self.num_steps} steps"]
        if self.time_range is not None:
            parts.append("t from {} to {}".format(*map(_exact, self.time_range)))
        if self.time_shift is not None:
            parts.append(f"times shifted by {_exact(self.time_shift)}")
        if self.state_refresh is not None:
            parts.append(f"encoder in every {self.state_refresh}. step")
        if given.keys() & {"diffusion", "diffusion_norm"}:
            parts.append(f"diffusion {_exact(own['diffusion_norm'])} {own['diffusion']}")
        if given.keys() & {"last_step", "last_step_size"}:
            size = "" if own["last_step_size"] is None else f" of {_exact(own['last_step_size'])}"
            parts.append(f"last step {own['last_step']}{size}")
        return parts


def check_told(told: bool, options: Mapping[str, float | None]) -> None:
    """Raises UserError where a model is told no guidance (`Backbone.guidance_condition`) and one of these is given."""
    given = [name for name, value in options.items() if value is not None]
    if given and not told:
        raise UserError(
            f"{given[0]} is for a model that was trained with model.guidance_condition=true, which this one was not; "
            "drop it, or use cfg_scale"
        )


def check_solver(name: str, solvers: Mapping[str, Solver]) -> None:
    """Raises UserError where an objective does not have this solver among its own."""
    if name not in solvers:
        raise UserError(f"sampler '{name}' does not fit the objective of this run; use {', '.join(solvers)}")


def check_classes(classes: Sequence[int], dataset: LatentDataset, most: int | None) -> tuple[int, ...]:
    """The classes asked for, or the first `most` (None: all) that have images. Raises UserError for a label the data
    set lacks.
    """
    count = dataset.info.num_classes
    for label in classes:
        if not 0 <= label < count:
            raise UserError(f"class {label} is not in this data set; labels are 0..{count - 1}")
    return tuple(classes) or tuple(np.unique(dataset.labels)[:most].tolist())


def _exact(number: float) -> str:
    return repr(float(number)).removesuffix(".0")
