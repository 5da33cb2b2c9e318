"""SRA (arXiv 2505.02831): a block's tokens are aligned with those of a later block of a teacher that sees less noise.

The teacher is the moving average of the model itself. No encoder and no further data are read.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_fast.data import DatasetInfo
from dit_fast.diffusion import Path, velocity_error
from dit_fast.diffusion.checks import check_batch
from dit_fast.diffusion.paths import as_path
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.base import Method, Term, refuse_unread
from dit_fast.models import Backbone, Taps, split
from dit_fast.nn.projector import SelfProjector
from dit_fast.objectives import Context
from dit_fast.ops import repa_cosine
from dit_fast.options import check_choice, setting
from dit_fast.philox import Stream

Distance = Literal["cosine", "smooth_l1"]
Axis = Literal["channels", "tokens"]
BETA = 0.05  # where the smooth L1 distance turns from squares to absolute values
SHIFT_STREAM = Stream.METHOD + 1
AT_ONCE = 32  # parameters of the teacher that one update moves, so that what it keeps meanwhile stays small


def alignment(prediction: Tensor, target: Tensor, distance: Distance = "cosine", axis: Axis = "channels") -> Tensor:
    """How far prediction is from target, both [N, T, D]: 0-d, in at least float32. The target gets no gradient.

    "cosine": 1 - the mean cosine, of two tokens ("channels"), or as the published code has it of the values that one
    channel takes over the tokens ("tokens"). "smooth_l1": the mean of d^2 / 0.1 where |d| < 0.05, else |d| - 0.025;
    it has no axis. Raises UserError for another name and for shapes that differ.
    """
    check_choice("distance", distance, Distance)
    check_choice("axis", axis, Axis)
    target = target.detach()
    if distance == "cosine":
        pair = (prediction, target) if axis == "channels" else (prediction.mT, target.mT)
        return 1 + repa_cosine(*pair)
    if prediction.shape != target.shape:
        raise UserError(f"alignment of {list(prediction.shape)} with {list(target.shape)}; give one shape")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return F.smooth_l1_loss(prediction.to(wide), target.to(wide), beta=BETA)


class SRALosses(NamedTuple):
    """flow: mean squared error of the velocity, [N]. alignment: of student and teacher, 0-d."""

    flow: Tensor
    alignment: Tensor


def sra_loss(
    model: Any,
    teacher: Backbone,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    noise: Tensor,
    shift: Tensor,
    student_depth: int,
    teacher_depth: int,
    distance: Distance = "cosine",
    axis: Axis = "channels",
    path: Path | str = "linear",
) -> SRALosses:
    """Both losses; the published total is flow.mean() + 0.5 alignment (cosine) or + 0.2 alignment (smooth_l1).

    model: with its head `ap_head`. teacher: its moving average, or `Backbone.trunk` of that; it runs without gradient
    and ends after its block. x, noise [N, C, H, W]; y [N] int64, the same for both; t [N] in [0, 1]; shift [N]: the
    teacher is at clamp(t - shift, 0, 1) with the same noise. student_depth, teacher_depth: blocks, from 1. distance,
    axis: as for `alignment`. Source: SRA, and its published code. Raises UserError for what does not fit.
    """
    if not hasattr(model, "ap_head"):
        raise ConfigError("sra_loss needs a model with its alignment head, `ap_head`; `load_official` gives one")
    block, last = model.block(student_depth, "student_depth"), teacher.block(teacher_depth, "teacher_depth")
    check_batch(model, x, y, t, path)
    if shift.shape != t.shape:
        raise UserError(f"sra_loss needs a shift of shape {list(t.shape)}, not {list(shift.shape)}")
    path, earlier = as_path(path), (t - shift).clamp(0, 1)
    noised, velocity = path.interpolate(x, noise, t)
    output, features = model(noised, t, y, taps=(block,))
    with torch.no_grad():
        _, targets = teacher(path.interpolate(x, noise, earlier)[0], earlier, y, (last,), last)
    aligned = alignment(model.ap_head(features[block]), targets[last], distance, axis)
    return SRALosses(velocity_error(split(output)[0], velocity), aligned)


class SRA(Method):
    """The alignment term. Head and teacher are its own: the head lies in the model as `ap_head`, the teacher beside it.

    The teacher is whole on every rank, in float32, as far as its block; it moves by applied updates alone.
    """

    name = "sra"
    title = "SRA"
    about = "one block is aligned with a later block of the model's own average, at less noise"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Which blocks are aligned (published: 3 with 8 for B, 6 with 16 for L, 8 with 20 for XL), and how."""

        name: ClassVar[str] = "sra"
        student_depth: int = setting(8, "Aligned block of the model, from 1", "[1, 1000]")
        teacher_depth: int = setting(20, "Block of the teacher that it is aligned with, from 1", "[1, 1000]")
        distance: Distance = setting("cosine", "As in the published code's default, or as in the paper")
        axis: Axis = setting("channels", "What a cosine sums over; published: tokens, for each channel")
        weight: float = setting(0.5, "Weight of the term (published: 0.5 for cosine, 0.2 for smooth_l1)", "[0, 1e6]")
        weight_knee: int = setting(0, "Step up to which the weight stays as it is", "[0, 1e12]")
        weight_decade: int = setting(0, "Steps in which it then falls to a tenth; 0 = it stays", "[0, 1e12]")
        t_max: float = setting(0.2, "The teacher's time is earlier by up to this share of the whole", "[0, 1]")
        decay: float = setting(0.9999, "Decay of the moving average that is the teacher", "[0, 1)")

        def __post_init__(self) -> None:
            if self.teacher_depth < self.student_depth:
                raise ConfigError(
                    f"methods.sra.teacher_depth={self.teacher_depth} lies before methods.sra.student_depth="
                    f"{self.student_depth}; a teacher of a shallower block has nothing to teach: swap them"
                )

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Adds the head and copies the teacher. Raises ConfigError for a block that the model does not have."""
        super().__init__(config, model, data)
        refuse_unread(config, "axis", "distance", "cosine")
        if config.weight_knee and not config.weight_decade:
            raise ConfigError(
                f"methods.sra.weight_knee={config.weight_knee}: the weight stays as it is with weight_decade=0; set "
                "methods.sra.weight_decade to the steps in which it falls to a tenth, or weight_knee=0"
            )
        self.block = model.block(config.student_depth, "methods.sra.student_depth")
        self.last = model.block(config.teacher_depth, "methods.sra.teacher_depth")
        self.blocks = frozenset({self.block})
        self.teacher = model.trunk(self.last)
        self.teachers = (self.teacher,)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.moving = {name: x.detach() for name, x in self.teacher.named_parameters() if name in trained}
        self.head = SelfProjector(model.hidden_size)
        model.add_head("ap_head", self.head)

    def terms(self, context: Context) -> dict[str, Term]:
        config = self.config
        shift = config.t_max * context.key.uniform(SHIFT_STREAM, ())
        with torch.no_grad():
            taps = Taps({self.last})
            self.teacher(*context.earlier(shift), context.y, taps, self.last)
        prediction = self.head(context.features[self.block])
        aligned = alignment(prediction, taps.features[self.last], config.distance, config.axis)
        return {"sra/alignment": Term(aligned, self.weight(context.number))}

    def weight(self, number: int) -> float:
        """Of the term in an optimizer step, counted from 0."""
        config = self.config
        late = max(0, number - config.weight_knee) / config.weight_decade if config.weight_decade else 0.0
        return config.weight * 0.1**late

    def kind(self, number: int) -> Hashable:
        return self.active(number) and self.weight(number)

    def after_update(self, model: Backbone, applied: Tensor) -> None:
        source, share = dict(model.named_parameters()), (1 - self.config.decay) * applied
        names, teachers = list(self.moving), list(self.moving.values())
        for start in range(0, len(names), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            changes = torch._foreach_sub([source[name] for name in names[part]], teachers[part])
            torch._foreach_mul_(changes, share)
            torch._foreach_add_(teachers[part], changes)

    def tensors(self) -> Mapping[str, Tensor]:
        return self.moving
