"""LayerSync (arXiv 2510.12581): a block's tokens are aligned with those of a deeper block of the same forward."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.errors import ConfigError, UserError
from dit_fast.methods.base import Method, Term
from dit_fast.models import Backbone
from dit_fast.objectives import Context
from dit_fast.ops import repa_cosine
from dit_fast.options import setting


def layersync_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Minus the mean cosine over samples and tokens of two block outputs [N, T, D]; 0-d, in at least float32.

    The teacher, the deeper of the two, gets no gradient. Source: published code, `transport.py`. Raises UserError for
    shapes that differ.
    """
    if student.shape != teacher.shape:
        raise UserError(f"layersync_loss: {list(student.shape)} aligned with {list(teacher.shape)}; give one shape")
    return repa_cosine(student, teacher.detach())


class LayerSync(Method):
    """One term, the sum over the pairs of blocks. There is no head, and nothing is read."""

    name = "layersync"
    title = "LayerSync"
    about = "one block is aligned with a deeper one of the same forward"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Which blocks are aligned with which (published: 8 with 16 for XL), and how much a pair counts."""

        name: ClassVar[str] = "layersync"
        student_depths: tuple[int, ...] = setting((8,), "Aligned blocks, from 1, with commas between")
        teacher_depths: tuple[int, ...] = setting((16,), "The deeper block that each is aligned with, in their order")
        weight: float = setting(0.2, "Weight of each pair", "[0, 1e6]")

        def __post_init__(self) -> None:
            students, teachers = self.student_depths, self.teacher_depths
            if not students or len(students) != len(teachers):
                raise ConfigError(
                    f"methods.layersync.student_depths lists {len(students)} blocks and teacher_depths "
                    f"{len(teachers)}; give pairs, one or more"
                )
            for student, teacher in zip(students, teachers, strict=True):
                if teacher <= student:
                    raise ConfigError(
                        f"methods.layersync: block {student} aligned with block {teacher}; a block has nothing to "
                        "learn from itself or from a shallower one, so give a deeper teacher"
                    )
            if len(pairs := set(zip(students, teachers, strict=True))) < len(students):
                raise ConfigError(f"methods.layersync lists a pair twice, only {len(pairs)} differ; keep one of each")

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Raises ConfigError for a block that the model does not have."""
        super().__init__(config, model, data)
        students = [model.block(depth, "methods.layersync.student_depths") for depth in config.student_depths]
        teachers = [model.block(depth, "methods.layersync.teacher_depths") for depth in config.teacher_depths]
        self.pairs = list(zip(students, teachers, strict=True))
        self.blocks = frozenset({*students, *teachers})

    def terms(self, context: Context) -> dict[str, Term]:
        losses = [layersync_loss(context.features[a], context.features[b]) for a, b in self.pairs]
        value = losses[0]
        for loss in losses[1:]:
            value = value + loss
        logs = {f"layersync/{a + 1}_{b + 1}": loss for (a, b), loss in zip(self.pairs, losses, strict=True)}
        return {"layersync/alignment": Term(value, self.config.weight, logs if len(losses) > 1 else {})}
