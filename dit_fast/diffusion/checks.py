"""What plain functions are given, looked at before a model is: one line instead of what torch says from inside of it.

Shapes, numbers and what a model says of itself are always looked at, values of tensors on a CPU alone: to read those of
a device a training step would wait for it, and a tensor that is traced or transformed has none.
"""

from typing import cast

import torch
from torch import Tensor, nn

from dit_fast.diffusion.conversions import T_EPS, Prediction
from dit_fast.diffusion.grids import ROUNDING
from dit_fast.diffusion.guidance import described, is_number
from dit_fast.diffusion.paths import Path, as_path
from dit_fast.errors import UserError
from dit_fast.tree import Tree, image, label


def readable(values: Tensor) -> bool:
    """Whether a look at the values of a tensor is possible, and waits for no device."""
    plain = type(values) in (Tensor, nn.Parameter) and values.layout == torch.strided and values.device.type == "cpu"
    return plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def check_batch(
    model: object,
    x: Tree,
    y: Tree,
    t: Tensor,
    path: Path | str = "linear",
    prediction: Prediction | str = "velocity",
) -> None:
    """Raises UserError unless x [N, ...], labels y and times t are of one N and the model knows such labels, is of this
    path and makes such a prediction.
    """
    count = len(image(x))
    check_labels(model, label(y) if isinstance(y, dict) else y, count)
    check_unit("t", t, count)
    path_of(model, path)
    predicted_by(model, prediction)


def check_labels(model: object, y: object, count: int, wait: bool = False) -> None:
    """Raises UserError unless y is int64 (or int32) [count], labels of this model where it says num_classes.

    wait: for values on a device, too.
    """
    if not isinstance(y, Tensor) or y.shape != (count,) or y.dtype not in (torch.int64, torch.int32):
        raise UserError(f"labels y must be int64 [{count}], one for each sample, not {described(y)}")
    if wait:
        check_dense("y", y)
    classes = getattr(model, "num_classes", None)
    if not isinstance(classes, int) or not (wait or readable(y)):
        return
    bad = ((y < 0) | (y > max(classes - 1, getattr(model, "null_label", -1)))).nonzero()
    if len(bad):
        row = int(bad[0])
        raise UserError(f"y[{row}] = {int(y[row])} is no label of this model; its labels are 0..{classes - 1}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises UserError for a tensor without values or with gaps."""
    if tensor.is_meta or tensor.layout != torch.strided:
        raise UserError(f"{name} must be a dense tensor with values, not {tensor.layout} on {tensor.device}")


def check_unit(name: str, t: Tensor, count: int) -> None:
    """Raises UserError unless t is floats [count], times from 0 to 1."""
    if not isinstance(t, Tensor) or t.shape != (count,) or not t.is_floating_point():
        raise UserError(f"{name} must be floats [{count}], one time for each sample, not {described(t)}")
    if readable(t) and len(bad := (~((t >= -ROUNDING) & (t <= 1 + ROUNDING))).nonzero()):
        row = int(bad[0])
        raise UserError(f"{name}[{row}] = {float(t[row]):g}; a time lies in [0, 1] (0 is data, 1 is noise)")


def check_order(low: tuple[str, Tensor], high: tuple[str, Tensor]) -> None:
    """Raises UserError where the first of two named tensors [N] lies above the second."""
    (name, below), (other, above) = low, high
    if readable(below) and readable(above) and len(bad := (below > above + ROUNDING).nonzero()):
        row = int(bad[0])
        values = f"{name}[{row}] = {float(below[row]):g} lies above {other}[{row}] = {float(above[row]):g}"
        raise UserError(f"{values}; swap them")


def check_t_eps(t_eps: object, used: bool) -> None:
    """Raises UserError for what is no time between 0 and 1, and, if nothing uses it, for another than the default."""
    if not is_number(t_eps) or not 0 < t_eps < 1:  # type: ignore[operator]
        raise UserError(f"t_eps={t_eps!r} must be a time in (0, 1): it divides next to the data")
    if not used and t_eps != T_EPS:
        raise UserError(
            f"t_eps={t_eps} has no effect here: it is of a velocity that is made from a prediction of x; drop t_eps="
        )


def predicted_by(model: object, given: Prediction | str | None = None) -> Prediction:
    """What a model returns: what was given, else what the model says (`Backbone.prediction`), else a velocity.

    Raises UserError where what was given is not what the model says.
    """
    own = getattr(model, "prediction", None)
    if own is not None and given not in (None, own):
        raise UserError(
            f"this {type(model).__name__} predicts '{own}', not '{given}'; give prediction='{own}' where that can be "
            "given, or set model.prediction where it was trained anew"
        )
    return cast(Prediction, given or own or "velocity")


def path_of(model: object, given: Path | str | None = None) -> Path:
    """The path that a model was trained on: what was given, else what the model says (`Backbone.path`), else linear.

    Raises UserError for an unknown one, and where what was given is not what the model says. Another class's attribute
    of that name may be anything; what is no name of a path says nothing.
    """
    own = getattr(model, "path", None)
    if not isinstance(own, str) or own not in Path.NAMES:
        own = None
    path = as_path(given or own or "linear")
    if own not in (None, path.name):
        raise UserError(
            f"this {type(model).__name__} was trained on the {own} path, not on '{path.name}'; give path='{own}' where "
            "that can be given, or set model.path where it was trained anew"
        )
    return path
