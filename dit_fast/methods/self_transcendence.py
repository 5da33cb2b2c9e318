"""Self-Transcendence (arXiv 2601.07773): a model of the first stage, guided, teaches features to one of the second.

Stage 1 is `StructureGuidance`: a shallow block alone must predict what the model does. Stage 2, `SelfTranscendence`, is
a new model whose features follow those of the frozen first. Each acts on the samples whose t lies inside a range.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.diffusion import Path, velocity_error
from dit_fast.diffusion.checks import check_batch, path_of
from dit_fast.diffusion.guidance import is_number
from dit_fast.diffusion.paths import as_path
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.base import Load, Method, Term
from dit_fast.models import Backbone, split
from dit_fast.nn.embeddings import patches
from dit_fast.nn.projector import LatentHead, projector
from dit_fast.objectives import Context
from dit_fast.options import check_choice, setting
from dit_fast.tree import Tree, each, image

Mask = Literal["per_sample", "published"]
Target = Literal["velocity", "latent"]
TARGET = "velocity: what the objective predicts, as published; latent: clean latents, as in the paper"
STAGES = ("stage1", "stage2")  # folders inside that of the run


class SelfTranscendenceLosses(NamedTuple):
    """flow: squared error of the velocity, [N]. guided: squared error of the features before the mask, [N].
    alignment: 0-d, after the mask; its mean keeps the whole batch as denominator."""

    flow: Tensor
    guided: Tensor
    alignment: Tensor


def self_transcendence_loss(
    model: Any,
    teacher: Any,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    student_depth: int,
    teacher_depth: int,
    guidance: float,
    t_range: tuple[float, float],
    mask: Mask = "per_sample",
    path: Path | str = "linear",
) -> SelfTranscendenceLosses:
    """The losses of stage 2; the published total is flow + 0.5 alignment, each averaged over the batch.

    model, teacher: backbones of one width; the student's head is `model.projectors[0]`, the teacher gets no gradient
    and has a null label. x, noise [N, C, H, W]; y [N] int64; t [N]. Depths count blocks from 1. guidance: s of
    F = F_u + s (F_c - F_u). t_range: both ends count. mask "published": mean(guided) * mean(mask), what the published
    code computes. Source: paper, Sec. 3; published code, `selftrans_Loss`. Raises UserError for what does not fit.
    """
    if not hasattr(model, "projectors"):
        raise ConfigError("self_transcendence_loss needs a model with a head, `projectors`; `load_official` gives one")
    if not is_number(guidance) or not math.isfinite(guidance):
        raise UserError(f"guidance={guidance!r} must be a finite number; 1 = the features of the label")
    block, last = model.block(student_depth, "student_depth"), teacher.block(teacher_depth, "teacher_depth")
    check_batch(model, x, y, t, path)
    path_of(teacher, path)
    noised, velocity = as_path(path).interpolate(x, noise, t)
    output, features = model(noised, t, y, taps=(block,))
    target = guided_features(teacher, noised, t, y, last, guidance)
    guided = velocity_error(model.projectors[0](features[block]), target)
    flow = velocity_error(split(output)[0], velocity)
    return SelfTranscendenceLosses(flow, guided, masked_mean(guided, t, t_range, mask))


@torch.no_grad()
def guided_features(teacher: Any, noised: Tree, times: Tensor, y: Tensor, block: int, guidance: float) -> Tensor:
    """F_u + guidance (F_c - F_u), [N, T, D] in at least float32, of a block (from 0): one forward of 2N, to that block.

    noised, times: as the teacher takes them. y: labels of F_c; F_u has the teacher's null label.
    """
    twice = each(lambda leaf: torch.cat((leaf, leaf)), noised)
    labels = torch.cat((y, teacher.null(y)))
    _, features = teacher(twice, torch.cat((times, times)), labels, taps=(block,), stop=block)
    feature = features[block]
    conditional, unconditional = feature.to(torch.promote_types(feature.dtype, torch.float32)).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def structure_error(tokens: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean squared error [N] of the image that tokens [N, T, p * p * C], channel fastest, stand for against target
    [N, C, H, W], of grid = (rows, columns) patches."""
    return velocity_error(tokens, patches(target, target.shape[2] // grid[0]))


def masked_mean(losses: Tensor, t: Tensor, t_range: tuple[float, float], mask: Mask) -> Tensor:
    """0-d mean of losses [N] over the whole batch, where those whose t [N] lies outside of t_range count 0.

    mask "published": mean(losses) * mean(inside), since the published code multiplies [N] by [N, 1, 1, 1].
    """
    if len(t_range) != 2 or not t_range[0] <= t_range[1]:
        raise UserError(f"t_range={t_range} must be (smallest, largest) t that counts, in order")
    low, high = t_range
    inside = ((t >= low) & (t <= high)).to(losses.dtype)
    check_choice("mask", mask, Mask)
    return (losses * inside).mean() if mask == "per_sample" else losses.mean() * inside.mean()


class Stage(Method):
    """What both have: an error of one block's head, which counts where t lies inside a range."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Of both stages."""

        name: ClassVar[str]
        projector_width: int = setting(2048, "Hidden width of the head", "[1, 65536]")
        t_low: float = setting(0.4, "Smallest t that counts", "[0, 1]")
        t_high: float = setting(0.7, "Largest t that counts", "[0, 1]")
        mask: Mask = setting(
            "per_sample", "per_sample: 0 outside of the range; published: mean(loss) * mean(mask), by its broadcast"
        )
        weight: float = setting(0.5, "Weight of the term", "[0, 1e6]")

        def __post_init__(self) -> None:
            if self.t_low > self.t_high:
                raise ConfigError(
                    f"methods.{self.name}.t_low={self.t_low} lies above t_high={self.t_high}; exchange them"
                )

    def at(self, model: Backbone, key: str) -> None:
        """Takes the block of this key of the configuration. Raises ConfigError where the model has none."""
        self.block = model.block(getattr(self.config, key), f"methods.{self.name}.{key}")
        self.blocks = frozenset({self.block})

    def term(self, name: str, error: Tensor, context: Context) -> dict[str, Term]:
        """The masked mean of an error [N]; the mean without the mask is logged."""
        config, t = self.config, context.objective.unit(context.times)
        value = masked_mean(error, t, (config.t_low, config.t_high), config.mask)
        return {f"{self.name}/{name}": Term(value, config.weight, {f"{self.name}/unmasked": error.mean()})}


class StructureGuidance(Stage):
    """Stage 1: a head on a shallow block predicts the model's own target, or the clean latents."""

    name = "structure_guidance"
    title = "structure guidance"
    about = "a shallow block learns to predict by itself"

    @dataclass(frozen=True, kw_only=True)
    class Config(Stage.Config):
        """Stage 1 of Self-Transcendence, alone: which block predicts what."""

        name: ClassVar[str] = "structure_guidance"
        depth: int = setting(2, "Block with the head, from 1 (published for B: 2)", "[1, 1000]")
        target: Target = setting("velocity", TARGET)

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Adds the head, `projectors` and `projectors_final`. Raises ConfigError for a block that is not there."""
        super().__init__(config, model, data)
        self.at(model, "depth")
        channels, height, width = model.shapes["image"]
        self.mlp = projector(model.hidden_size, config.projector_width, model.hidden_size)
        self.head = LatentHead(model.hidden_size, channels * height * width // model.num_tokens)
        model.add_projector(self.mlp)
        model.add_head("projectors_final", self.head)

    def terms(self, context: Context) -> dict[str, Term]:
        config, model = self.config, context.model
        tokens = context.features[self.block][:, -model.num_tokens :]  # without a class token
        target = image(context.target if config.target == "velocity" else context.x)
        error = structure_error(self.head(self.mlp(tokens)), target, model.grid)
        return self.term("structure", error, context)


class SelfTranscendence(Stage):
    """Stage 2: features of one block follow the guided ones of a frozen teacher, which was trained in stage 1."""

    name = "self_transcendence"
    title = "Self-Transcendence"
    about = "one block follows the guided features of a frozen model of a first stage"

    @dataclass(frozen=True, kw_only=True)
    class Config(Stage.Config):
        """Two stages in RUN/stage1 and RUN/stage2, of one range, mask and width; with a teacher, the second in RUN."""

        name: ClassVar[str] = "self_transcendence"
        student_depth: int = setting(6, "Block that learns, from 1 (published for B: 6)", "[1, 1000]")
        teacher_depth: int = setting(8, "The teacher's block, from 1 (published for B: 8)", "[1, 1000]")
        guidance: float = setting(30.0, "s of F_u + s (F_c - F_u) (published for B: 30)", "[0, 1e6]")
        stop_step: int = setting(100_000, "Step from which neither teacher nor term is computed; 0 = never", "[0, 1e9]")
        teacher: str = setting("", "Run or step folder of a teacher; empty = train one first", resumes=True)
        teacher_weights: Literal["model", "ema"] = setting("model", "The teacher's weights, as they are or averaged")
        stage1_steps: int = setting(200_000, "Optimizer steps of stage 1", "[1, 1e9]")
        stage1_depth: int = setting(2, "Block with the head in stage 1, from 1 (published for B: 2)", "[1, 1000]")
        stage1_target: Target = setting("velocity", TARGET)
        stage1_weight: float = setting(0.5, "Weight of the term in stage 1", "[0, 1e6]")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Adds the head, one of `projectors`. Raises ConfigError for a block that is not there."""
        super().__init__(config, model, data)
        self.at(model, "student_depth")
        self.facts = _facts(model)
        self.head = projector(model.hidden_size, config.projector_width, model.hidden_size)
        model.add_projector(self.head)

    @staticmethod
    def stages(config: Any, run: Any) -> list[Any]:
        if StructureGuidance.name in [other.name for other in run.methods]:
            raise ConfigError(
                f"{StructureGuidance.name} is the first stage of {config.name}, whose second trains without it; set "
                f"methods={config.name} (methods.{config.name}.stage1_* are its settings)"
            )
        first, second = (str(Folder(run.run.dir, stage)) for stage in STAGES)
        if config.teacher:
            return [run]
        shared = {key: getattr(config, key) for key in ("projector_width", "t_low", "t_high", "mask")}
        guidance = StructureGuidance.Config(
            depth=config.stage1_depth, target=config.stage1_target, weight=config.stage1_weight, **shared
        )
        teaching = dataclasses.replace(config, teacher=first)
        return [
            _changed(run, config.name, guidance, dir=first, steps=config.stage1_steps),
            _changed(run, config.name, teaching, dir=second),
        ]

    def prepare(self, load: Load) -> None:
        """Reads the teacher. Raises ConfigError where its features cannot be this model's target."""
        config, key = self.config, f"methods.{self.name}.teacher"
        teacher, digest = load(config.teacher, config.teacher_weights)
        for what, other in _facts(teacher).items():
            if (own := self.facts[what]) != other:
                raise ConfigError(
                    f"{key}={config.teacher}: its {what} are {other}, this model's {own}; features of the two cannot "
                    "be compared, so give a teacher of the same model"
                )
        self.teacher_block = teacher.block(config.teacher_depth, f"methods.{self.name}.teacher_depth")
        if teacher.null_label < 0:
            raise ConfigError(
                f"{key}: the teacher has no trained null label, which guided features need; train it with label dropout"
            )
        self.teachers, self.digests = (teacher,), {"teacher": digest}

    def terms(self, context: Context) -> dict[str, Term]:
        config = self.config
        (teacher,) = self.teachers
        labels = context.batch["label"]  # before label dropout, as published
        target = guided_features(teacher, context.noised, context.times, labels, self.teacher_block, config.guidance)
        error = velocity_error(self.head(context.features[self.block]), target)
        return self.term("alignment", error, context)


def _facts(model: Backbone) -> dict[str, Any]:
    """In what a teacher is like its student, where features of the two are compared."""
    return {
        "denoised leaves": model.shapes,
        "tokens": model.num_tokens,
        "width": model.hidden_size,
        "times": model.times,
        "classes": model.num_classes,
    }


def _changed(run: Any, name: str, method: Any, **of_run: Any) -> Any:
    """A run with another method in the place of the one of this name, and other settings of `run.*`."""
    methods = tuple(method if each.name == name else each for each in run.methods)
    return dataclasses.replace(run, methods=methods, run=dataclasses.replace(run.run, **of_run))
