"""Model sizes read from the names and shapes of a published state_dict, and the order of its parameters."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit_fast.errors import CheckpointError

logger = logging.getLogger("dit_fast")

BASE = ("pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")
# Registration order of each published class: the order of `model.parameters()`, by which its optimizer counts.
GROUPS = {
    "sit": BASE,
    "dit": BASE,
    "repa": (*BASE[:-1], "projectors", BASE[-1]),
    "diversedit": (BASE[0], "skip_linears", "skip_norms", *BASE[1:-1], "projectors", BASE[-1]),
    "reg": (*BASE[:-1], "projectors", BASE[-1], "cls_projectors2", "wg_norm"),
    "mean_flow": (*BASE, "r_embedder"),
    "sra": (*BASE[:-1], "ap_head", BASE[-1]),
    "self_transcendence": (*BASE[:-1], "projectors", "projectors_final", BASE[-1]),
}
# What one family alone has: where it belongs, and what makes a model have it.
OWN = {
    "skip_linears": ("diversedit", "a model with long skips"),
    "skip_norms": ("diversedit", "a model with long skips"),
    "cls_projectors2": ("reg", "a model with a class token"),
    "wg_norm": ("reg", "a model with a class token"),
    "r_embedder": ("mean_flow", "a model of two times"),
    "ap_head": ("sra", "the head of SRA"),
}
UNLISTED = re.compile(r"projectors\.([024]\.(?:weight|bias))")  # of a lone head that lies in no list


@dataclass(frozen=True)
class Layout:
    """Sizes of a model. projectors: (hidden width, output width) of each alignment head. class_token, times: as in
    `SiT.Config`. latent_head: whether the first stage of Self-Transcendence left its `projectors_final`.

    label_dropout: 0 where the null label has no row, or is known never to have been trained.
    """

    input_size: int
    patch_size: int
    in_channels: int
    head_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    null_row: bool
    label_dropout: float
    qk_norm: bool
    class_token: int
    times: int
    projectors: tuple[tuple[int, int], ...]
    latent_head: bool

    def settings(self) -> dict[str, Any]:
        """Fields of `SiT.Config`."""
        beside = ("head_channels", "null_row", "projectors", "latent_head")
        return {"name": "", **{key: value for key, value in vars(self).items() if key not in beside}}


def read_layout(
    state: Mapping[str, Tensor],
    family: str,
    num_heads: int | None,
    num_classes: int | None,
    label_dropout: float | None,
) -> Layout:
    """Sizes from shapes and from what else is known about the model (None: not known).

    What is known from neither is taken to be as usual and logged in one line: heads of width 64 (72 at width 1152), and
    a label table whose last row is the null label.
    Raises CheckpointError naming the key that is missing or does not fit.
    """
    _, tokens, of_positions = _shape(state, "pos_embed", 3)
    of_patches, channels, patch, _ = _shape(state, "x_embedder.proj.weight", 4)
    rows, of_head = _shape(state, "final_layer.linear.weight", 2)
    labels, of_labels = _shape(state, "y_embedder.embedding_table.weight", 2)
    # By majority, so that a single wrong shape is found to be the wrong one.
    width = Counter([of_positions, of_patches, of_head, of_labels]).most_common(1)[0][0]
    class_token = _shape(state, "cls_projectors2.weight", 2)[1] if family == "reg" else 0
    patches = tokens - bool(class_token)
    grid = math.isqrt(patches)
    if grid**2 != patches:
        hint = family_hint(state, family) or f": not a model of family '{family}'"
        raise CheckpointError(f"'pos_embed' has places for {patches} patches, which is not a square{hint}")
    if rows % patch**2:
        raise CheckpointError(f"'final_layer.linear.weight' has {rows} rows, not a multiple of {patch}x{patch} patches")
    blocks = _indices(state, r"blocks\.(\d+)\.")
    for index in range(max(blocks, default=0) + 1):
        if index not in blocks:
            raise CheckpointError(f"missing key 'blocks.{index}.attn.qkv.weight': the state_dict has no such block")
    aligned = _indices(state, r"projectors\.(\d+)\.0\.weight")
    assumed = []
    heads = _known_heads(state, width, num_heads)
    if heads is None:
        heads = _usual_heads(width)
        assumed.append(f"num_heads={heads} (heads of width {width // heads})")
    classes = num_classes
    if classes is None:
        classes = labels if label_dropout == 0 else labels - 1
        if label_dropout is None:
            assumed.append(f"num_classes={classes} (the last of {labels} labels is the null label)")
    if classes not in (labels, labels - 1):
        raise CheckpointError(
            f"num_classes={classes}, but 'y_embedder.embedding_table.weight' has {labels} rows: it has one for each "
            f"class, and one more for the null label if there is one; pass num_classes={labels - 1} or {labels}"
        )
    if assumed:
        logger.warning("the checkpoint does not say, so %s; pass other values if that is wrong", " and ".join(assumed))
    null_row = classes < labels
    return Layout(
        input_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        head_channels=rows // patch**2,
        hidden_size=width,
        depth=max(blocks) + 1,
        num_heads=heads,
        num_classes=classes,
        null_row=null_row,
        label_dropout=0.1 if null_row and label_dropout != 0 else 0.0,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        class_token=class_token,
        times=2 if family == "mean_flow" else 1,
        projectors=tuple(
            (_shape(state, f"projectors.{k}.0.weight", 2)[0], _shape(state, f"projectors.{k}.4.weight", 2)[0])
            for k in range(len(aligned))
        ),
        latent_head=family == "self_transcendence" and "projectors_final.linear.weight" in state,
    )


def family_hint(names: Iterable[str], family: str) -> str:
    """Which family to load instead, in brackets, if the first of the names that belongs to one alone says another."""
    groups = (name.split(".")[0] for name in names)
    owners = {group: owner for group, (owner, _) in OWN.items()} | {"projectors_final": "self_transcendence"}
    found = next((owners[group] for group in groups if group in owners), family)
    return "" if found == family else f" (use family='{found}')"


def listed_heads(state: dict[str, Tensor], family: str) -> tuple[dict[str, Tensor], bool]:
    """The state with its lone head as the first of a list, as models hold it, and whether it was one already.

    Published Self-Transcendence names it `projectors.{0, 2, 4}`, the families that may have several
    `projectors.0.{0, 2, 4}`.
    """
    if family != "self_transcendence" or not any(UNLISTED.fullmatch(name) for name in state):
        return state, True
    return {UNLISTED.sub(r"projectors.0.\1", name): tensor for name, tensor in state.items()}, False


def rename_legacy(state: dict[str, Tensor], encoder_depth: int | None) -> dict[str, Tensor]:
    """Old REPA files: `decoder_blocks.{j}` is block j + encoder_depth, which must then be given (CheckpointError)."""
    if not any(name.startswith("decoder_blocks.") for name in state):
        return state
    if encoder_depth is None:
        earlier = len(_indices(state, r"blocks\.(\d+)\."))
        raise CheckpointError(
            "'decoder_blocks.*' keys: an old REPA file splits its blocks at the aligned one; pass encoder_depth "
            f"(it has {earlier} earlier blocks)"
        )
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.match(r"decoder_blocks\.(\d+)\.(.*)", name):
            name = f"blocks.{int(match[1]) + encoder_depth}.{match[2]}"
        if name in result or (match and name in state):
            raise CheckpointError(
                f"encoder_depth={encoder_depth}: two blocks would be named '{name}'; give the right depth"
            )
        result[name] = tensor
    return result


def official_parameter_order(model: nn.Module, family: str) -> list[str]:
    """Names of `model.parameters()` in the published class of the family: the indices of its optimizer state.

    Raises CheckpointError naming a parameter that the family has no place for, or long skips that it lacks.
    """
    groups = GROUPS[family]
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
    return [name for group in groups for name in names if name.split(".")[0] == group]


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


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"missing key '{name}'")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"'{name}' has shape {shape}, expected {dimensions} dimensions, none of them 0")
    return shape


def _indices(state: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(match[1]) for name in state if (match := re.match(pattern, name))}


def _known_heads(state: Mapping[str, Tensor], width: int, given: int | None) -> int | None:
    if given is not None and (given < 1 or width % given):
        raise CheckpointError(f"num_heads {given} does not divide width {width}; pass the number of attention heads")
    if "blocks.0.attn.q_norm.weight" not in state:
        return given
    (of_head,) = _shape(state, "blocks.0.attn.q_norm.weight", 1)
    if width % of_head or given not in (None, width // of_head):
        wanted = "" if given is None else f"num_heads={given}, but "
        raise CheckpointError(
            f"{wanted}'blocks.0.attn.q_norm.weight' has shape ({of_head},), which makes {width / of_head:g} heads of "
            f"width {width}; pass that or nothing"
        )
    return width // of_head


def _usual_heads(width: int) -> int:
    if width != 1152 and width % 64:
        raise CheckpointError(f"width {width} is not a multiple of the usual head width 64; pass num_heads")
    return 16 if width == 1152 else width // 64
