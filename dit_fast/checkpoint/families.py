"""The families of checkpoints, and the order of their entries."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dit_fast.checkpoint import ddt, jit, lightningdit
from dit_fast.checkpoint.layout import GROUPS, OWN, Family
from dit_fast.errors import CheckpointError

# Other networks than SiT's, one file each.
FAMILIES: dict[str, Family] = {"lightningdit": lightningdit.FAMILY, "jit": jit.FAMILY, "ddt": ddt.FAMILY}
NAMES = (*GROUPS, *FAMILIES)


def official_parameter_order(model: nn.Module, family: str) -> list[str]:
    """Names of `model.parameters()` in the published class of the family: the indices of its optimizer state.

    Raises CheckpointError naming a parameter that the family has no place for, or long skips that it lacks.
    """
    parameters = dict(model.named_parameters())
    return [name for name in official_names(model, family) if name in parameters]


def official_names(model: nn.Module, family: str) -> list[str]:
    """Names of `model.state_dict()` in the published class of the family. Raises as above."""
    groups = FAMILIES[family].groups if family in FAMILIES else GROUPS[family]
    names = list(model.state_dict())
    parts = dict(OWN[group] for group in dict.fromkeys(name.split(".")[0] for name in names) if group in OWN)
    if len(parts) > 1:
        raise CheckpointError(f"no published code has this, {' and '.join(parts.values())} in one; keep our checkpoint")
    for name in names:
        if name.split(".")[0] not in groups:
            raise CheckpointError(
                f"'{name}' has no place in a checkpoint of family '{family}'; remove the module first"
            )
    for group, (owner, what) in OWN.items():
        if owner == family and not any(name.split(".")[0] == group for name in names):
            raise CheckpointError(f"missing '{group}.*': family '{family}' needs {what}")
    ordered = [name for group in groups for name in names if name.split(".")[0] == group]
    if family in FAMILIES and FAMILIES[family].in_block:
        inside = iter(sorted((name for name in ordered if name.startswith("blocks.")), key=FAMILIES[family].place))
        return [next(inside) if name.startswith("blocks.") else name for name in ordered]
    return ordered


def optimizer_state_by_name(opt_state: Mapping[str, Any], model: nn.Module, family: str) -> dict[str, dict[str, Any]]:
    """The `opt` entry of a published training checkpoint, by parameter name: {name: {step, exp_avg, exp_avg_sq}}.

    Published optimizers number all parameters, the frozen `pos_embed` included; what never had a gradient has no entry.
    Raises CheckpointError if the count or a shape does not fit the model.
    """
    order = official_parameter_order(model, family)
    try:
        listed = [int(index) for group in opt_state["param_groups"] for index in group["params"]]
        entries = sorted(opt_state["state"].items())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"not the state of a torch optimizer (param_groups, state): {error!r}") from None
    if sorted(listed) != list(range(len(order))) or not {index for index, _ in entries} <= set(listed):
        raise CheckpointError(
            f"optimizer state numbers {len(listed)} parameters; this '{family}' model has {len(order)}"
        )
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    result: dict[str, dict[str, Any]] = {}
    for index, entry in entries:
        name = order[index]
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != shapes[name]:
                raise CheckpointError(
                    f"optimizer state {index} '{key}' has shape {tuple(value.shape)}, but '{name}' has "
                    f"{tuple(shapes[name])}; was it written by another family?"
                )
        result[name] = dict(entry)
    return result
