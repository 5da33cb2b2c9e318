"""HASTE (arXiv 2505.16792): attention maps and features of a frozen encoder are followed, and at a step both end.

The end is the `stop_step` that every method has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dit_fast.data import DatasetInfo
from dit_fast.encoders import PretrainedViT
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.base import Term
from dit_fast.methods.base import active as active
from dit_fast.methods.repa import Alignment, repa_loss
from dit_fast.methods.targets import pixels
from dit_fast.models import Backbone
from dit_fast.nn.attention import Heads
from dit_fast.objectives import Context
from dit_fast.ops.autocast import without_autocast
from dit_fast.options import setting


def attention_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], heads: int | None = None
) -> Tensor:
    """Mean over layers of the mean of -sum_k softmax(teacher) log softmax(student) over samples, heads and queries.

    Both: one tensor [B, H, Q, K] of logits per layer, scaled, before the softmax over K; those of student and teacher
    differ at most in their number of heads. heads: the first so many of each count; None = as many as both have. 0-d,
    in at least float32; the teacher's get no gradient. Source: HASTE, Eq. 7, and its published code (heads: 12).
    Raises UserError for layers or shapes that do not fit, and for heads that one side does not have.
    """
    if len(student_logits) == 0 or len(student_logits) != len(teacher_logits):
        raise UserError(
            f"attention_loss pairs layers, at least one: not {len(student_logits)} with {len(teacher_logits)}"
        )
    pairs = zip(student_logits, teacher_logits, strict=True)
    return torch.stack([cross_entropy(student, teacher, heads) for student, teacher in pairs]).mean()


def cross_entropy(student: Tensor, teacher: Tensor, heads: int | None = None) -> Tensor:
    """One layer of `attention_loss`, 0-d."""
    if student.dim() != 4 or teacher.dim() != 4 or student[:, 0].shape != teacher[:, 0].shape:
        raise UserError(
            f"attention logits must be [B, H, Q, K], alike but for H, not {list(student.shape)} of the student and "
            f"{list(teacher.shape)} of the teacher"
        )
    both = min(student.shape[1], teacher.shape[1])
    if not 1 <= (count := both if heads is None else heads) <= both:
        raise UserError(
            f"heads={count}: the student has {student.shape[1]} heads and the teacher {teacher.shape[1]}; at most "
            f"{both} can be compared"
        )
    with without_autocast(student):
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        log = student[:, :count].to(wide).log_softmax(-1)
        return -(teacher[:, :count].detach().to(wide).softmax(-1) * log).sum(-1).mean()


def heads_loss(student: Sequence[Heads], teacher: Sequence[Heads], heads: int | None = None) -> Tensor:
    """`attention_loss` of queries and keys [N, H, T, d]; logits are q k^T / sqrt(d).

    The logits [N, H, T, T] of one layer at a time are there, in the backward pass too, which makes them again.
    """
    layers = [
        checkpoint(_layer, *ours, *theirs, heads, use_reentrant=False, preserve_rng_state=False)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(layers).mean()


def _layer(query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor, heads: int | None) -> Tensor:
    with without_autocast(query):
        return cross_entropy(logits(query, key), logits(teacher_query, teacher_key), heads)


def logits(query: Tensor, key: Tensor) -> Tensor:
    """[N, H, T, T], scaled, in at least float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return (query.to(wide) * query.shape[-1] ** -0.5) @ key.to(wide).mT


class HASTE(Alignment):
    """REPA's alignment and the attention of some blocks, both of one encoder that sees the images while training."""

    name = "haste"
    title = "HASTE"
    about = "features of one block and attention of several follow those of a frozen encoder, up to a step"

    @dataclass(frozen=True, kw_only=True)
    class Config(Alignment.Config):
        """What is aligned with a frozen transformer, and until when (published: DINOv2-B; defaults for SiT-XL)."""

        name: ClassVar[str] = "haste"
        stop_step: int = setting(250_000, "Step from which the method is not computed; 0 = never", "[0, 1e9]")
        attention_weight: float = setting(0.5, "Weight of the attention's term", "[0, 1e6]")
        student_depths: tuple[int, ...] = setting((5, 6, 7, 8), "Blocks whose attention is aligned, from 1")
        teacher_depths: tuple[int, ...] = setting((9, 10, 11, 12), "The encoder's blocks that they follow, from 1")
        attention_heads: int = setting(0, "First heads that are compared; 0 = as many as both have", "[0, 65536]")

        def __post_init__(self) -> None:
            students, teachers = len(self.student_depths), len(self.teacher_depths)
            if not students or students != teachers:
                raise ConfigError(
                    f"methods.haste.student_depths lists {students} blocks and teacher_depths {teachers}; give pairs, "
                    "one or more"
                )

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Adds the projector. Raises ConfigError for blocks, heads and encoders that are not there, DataError where the
        shards hold no images."""
        super().__init__(config, model, data)
        if len(config.encoders) != 1:
            raise ConfigError(
                f"methods.haste.encoders lists {len(config.encoders)}; give one vision transformer, e.g. "
                "methods.haste.encoders=dinov2-vit-b:PATH"
            )
        self.bind(model, data, class_token=None)
        (encoder,) = self.targets.encoders
        if not isinstance(encoder, PretrainedViT):
            raise ConfigError(
                f"methods.haste.encoders={config.encoders[0]} has no attention; give a vision transformer"
            )
        self.students = [model.block(depth, "methods.haste.student_depths") for depth in config.student_depths]
        for depth in config.teacher_depths:
            if not 1 <= depth <= encoder.depth:
                raise ConfigError(
                    f"methods.haste.teacher_depths={depth} is not one of the blocks 1..{encoder.depth} of "
                    f"{encoder.name}"
                )
        if config.attention_heads > (both := min(model.num_heads, encoder.heads)):
            raise ConfigError(
                f"methods.haste.attention_heads={config.attention_heads}: the model has {model.num_heads} heads and "
                f"{encoder.name} {encoder.heads}; set at most {both}, or 0"
            )
        self.attention = frozenset(self.students)
        self.grid = model.grid[0]

    def complete(self, batch: Mapping[str, Tensor], active: bool) -> Mapping[str, Tensor]:
        """Features, queries and keys of one pass; the class token and registers are left out before any softmax."""
        if not active:
            return {}
        encoder: Any = self.targets.encoders[0]
        given, seen = encoder.encode(pixels(batch), self.grid, [depth - 1 for depth in self.config.teacher_depths])
        made = {self.targets.features[0]: given["features"]}
        for number, parts in enumerate(seen):
            for kind, part in zip(Heads._fields, parts, strict=True):
                made[f"haste.{kind}_{number}"] = part[:, :, encoder.prefix :]
        return made

    def terms(self, context: Context) -> dict[str, Term]:
        config, batch, (head,) = self.config, context.batch, self.heads
        target, feature = batch[self.targets.features[0]], context.features[self.block]
        tokens = target.shape[1]  # without a class token of the model
        student = [Heads(*(part[:, :, -tokens:] for part in context.taps.heads[block])) for block in self.students]
        teacher = [
            Heads(*(batch[f"haste.{kind}_{number}"] for kind in Heads._fields)) for number in range(len(student))
        ]
        aligned = heads_loss(student, teacher, config.attention_heads or None)
        return {
            "haste/alignment": self.aligned([repa_loss(head(feature[:, -tokens:]), target)]),
            "haste/attention": Term(aligned, config.attention_weight),
        }
