"""HASTE (arXiv 2505.16792): attention maps and features of a frozen encoder are followed, and at a step both end.

The end is the `stop_step` that every method has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dit_fast.errors import UserError
from dit_fast.methods.base import active as active
from dit_fast.nn.attention import Heads
from dit_fast.ops.autocast import without_autocast


def attention_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], heads: int | None = None
) -> Tensor:
    """Mean over layers of the mean of -sum_k softmax(teacher) log softmax(student) over samples, heads and queries.

    Both: one tensor [B, H, Q, K] of logits per layer, scaled, before the softmax over K; those of student and teacher
    differ at most in their number of heads. heads: the first so many of each count; None = as many as both have. 0-d,
    in at least float32; the teacher's get no gradient. Source: HASTE, Eq. 7, and its published code (heads: 12).
    Raises UserError for layers or shapes that do not fit, and for heads that one side does not have.
    """
    if not student_logits or len(student_logits) != len(teacher_logits):
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
