"""What to draw: the one place of sampling options, of their defaults and of what they mean."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from dit_fast.checkpoint.run import LoadedRun
from dit_fast.data import LatentDataset
from dit_fast.diffusion import Guidance, Solver, sample
from dit_fast.diffusion.guidance import Channels
from dit_fast.diffusion.samplers import MOST_ROWS, check_options, check_whole
from dit_fast.diffusion.solvers import SolverName
from dit_fast.errors import UserError
from dit_fast.options import setting

SHOWN_CLASSES = 10
MOST_IMAGES = 1_000_000  # of a class
GUIDED = 2.5  # scale of the guidance where none is asked for; a mean velocity has it in its training target
STEPS = {"mean_flow": 1, "ddpm": 250}  # as published; otherwise
FEW = 20
USUAL = "heun"  # where the objective has it

Weights = Literal["ema", "model"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Image k has class classes[k % len(classes)] and depends on the seed, on k and on that class alone.

    Raises UserError naming a value that cannot be meant.
    """

    classes: tuple[int, ...] = setting((), "labels, e.g. 0,3,7 (default: the first ten)")
    per_class: int = setting(8, "images of each class")
    cfg_scale: float | None = setting(None, "guidance; 1 = off, 0 = no label (default: 2.5 if trained for it)")
    guidance_low: float = setting(0.0, "guide only for t from here ...")
    guidance_high: float = setting(1.0, "... to here (1 is pure noise)")
    cfg_channels: Channels | None = setting(None, "guided channels (default: what the model's own sampler guides)")
    class_token_cfg_scale: float | None = setting(None, "guidance of the class token (default: the image's)")
    sampler: SolverName | None = setting(None, "solver (default: heun; mean_flow for a mean velocity, ddpm for DDPM)")
    num_steps: int | None = setting(None, "sampling steps (default: 20; mean_flow 1, ddpm 250)")
    seed: int = setting(0, "image k depends on the seed, on k and on its class")
    weights: Weights = setting("ema", "moving average or raw weights")
    precision: Precision = setting("fp32", "bf16: autocast in the model")
    chunk: int = setting(16, "images computed together; equal values, equal bytes")

    def __post_init__(self) -> None:
        check_whole("per_class", self.per_class, 1, MOST_IMAGES)
        check_whole("chunk (--batch)", self.chunk, 1, MOST_ROWS)
        check_options(self.sampler or "euler", FEW if self.num_steps is None else self.num_steps, self.chunk, self.seed)
        scale = 1.0 if self.cfg_scale is None else self.cfg_scale
        Guidance(scale, self.guidance_low, self.guidance_high, self.cfg_channels or "all", self.class_token_cfg_scale)
        for name, kind in (("weights", Weights), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"unknown {name} '{getattr(self, name)}'; valid: {', '.join(get_args(kind))}")
        if len(set(self.classes)) < len(self.classes):
            twice = next(label for label in self.classes if self.classes.count(label) > 1)
            raise UserError(f"class {twice} is listed twice; raise per_class for more images of each class")

    @property
    def count(self) -> int:
        """Number of images, of resolved options."""
        return self.per_class * len(self.classes)

    def resolved(self, run: LoadedRun, dataset: LatentDataset) -> "SampleOptions":
        """The same with what run and data set decide filled in. Raises UserError for a class that is not
        there, and for a sampler that does not fit the objective.
        """
        model, solvers = run.model, run.objective.solvers
        sampler = self.sampler or next(name for name in (USUAL, *solvers) if name in solvers)
        check_solver(sampler, solvers)
        mean = model.times == 2
        guided = GUIDED if model.null_label >= 0 and not mean else 1.0
        return replace(
            self,
            classes=check_classes(self.classes, dataset),
            sampler=sampler,
            num_steps=STEPS.get(sampler, FEW) if self.num_steps is None else self.num_steps,
            cfg_scale=guided if self.cfg_scale is None else self.cfg_scale,
            cfg_channels=self.cfg_channels or model.cfg_channels,
        )

    def arguments(self) -> dict[str, Any]:
        """Resolved options that are keywords of `sample`, by name."""
        keywords = inspect.signature(sample).parameters
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in keywords}

    def text(self) -> str:
        """One line for captions: what was computed by resolved options."""
        assert self.sampler, "resolve the options first"
        assert self.cfg_scale is not None, "resolve the options first"
        parts = [self.sampler, f"{self.num_steps} steps", f"guidance {_exact(self.cfg_scale)}"]
        if self.class_token_cfg_scale is not None:
            parts[-1] += f" ({_exact(self.class_token_cfg_scale)} of the class token)"
        if self.cfg_scale != 1 and (self.guidance_low, self.guidance_high) != (0, 1):
            parts[-1] += f" for t in [{_exact(self.guidance_low)}, {_exact(self.guidance_high)}]"
        if self.cfg_scale != 1 and self.cfg_channels == "first_three":
            parts[-1] += " on channels 0 to 2"
        parts.append(f"seed {self.seed}")
        return ", ".join([*parts, *["raw weights"] * (self.weights == "model"), *["bf16"] * (self.precision == "bf16")])


def check_solver(name: str, solvers: Mapping[str, Solver]) -> None:
    """Raises UserError where an objective does not have this solver among its own."""
    if name not in solvers:
        raise UserError(f"sampler '{name}' does not fit the objective of this run; use {', '.join(solvers)}")


def check_classes(classes: Sequence[int], dataset: LatentDataset) -> tuple[int, ...]:
    """The classes asked for, or the first ten that have images. Raises UserError for a label the data set lacks."""
    count = dataset.info.num_classes
    for label in classes:
        if not 0 <= label < count:
            raise UserError(f"class {label} is not in this data set; labels are 0..{count - 1}")
    return tuple(classes) or tuple(np.unique(dataset.labels)[:SHOWN_CLASSES].tolist())


def _exact(number: float) -> str:
    return repr(float(number)).removesuffix(".0")
