"""Model sizes read from the names and shapes of a published state_dict."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from dit_fast.errors import CheckpointError
from dit_fast.models import Backbone
from dit_fast.nn.embeddings import LabelEmbedder

B = TypeVar("B", bound=Backbone)

BASE = ("pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")
# Registration order of each published class built on SiT: that of `model.parameters()`, by which its optimizer counts.
GROUPS = {
    "sit": BASE,
    "dit": BASE,
    "repa": (*BASE[:-1], "projectors", BASE[-1]),
    "diversedit": (BASE[0], "skip_linears", "skip_norms", *BASE[1:-1], "projectors", BASE[-1]),
    "reg": (*BASE[:-1], "projectors", BASE[-1], "cls_projectors2", "wg_norm"),
    "mean_flow": (*BASE, "r_embedder"),
    "sra": (*BASE[:-1], "ap_head", BASE[-1]),
    "self_transcendence": (*BASE[:-1], "projectors", "projectors_final", BASE[-1]),
    "irepa": (*BASE[:-1], "projectors", BASE[-1]),
    "repa_e": (*BASE[:-1], "projectors", BASE[-1], "bn"),
    "internal_guidance": (*BASE[:-1], "final_layer_xr", BASE[-1]),
}
# What one family alone has: where it belongs, and what makes a model have it.
OWN = {
    "skip_linears": ("diversedit", "a model with long skips"),
    "skip_norms": ("diversedit", "a model with long skips"),
    "cls_projectors2": ("reg", "a model with a class token"),
    "wg_norm": ("reg", "a model with a class token"),
    "r_embedder": ("mean_flow", "a model of two times"),
    "ap_head": ("sra", "the head of SRA"),
    "final_layer_xr": ("internal_guidance", "a model with auxiliary_depth"),
    "bn": ("repa_e", "the batch norm of REPA-E's latents"),
}
OF_HEAD = ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos")  # whose last dimension is the width of a head
UNLISTED = re.compile(r"projectors\.([024]\.(?:weight|bias))")  # of a lone head that lies in no list


@dataclass(frozen=True)
class Known:
    """What is known of a model beside its state_dict; None: not known.

    assumed: what was taken to be as usual, in words, as it came up.
    """

    num_heads: int | None = None
    num_classes: int | None = None
    label_dropout: float | None = None
    skip_wiring: str | None = None
    encoder_depth: int | None = None
    in_context_start: int | None = None
    assumed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """How models of a published code other than SiT's are read and written; one file and one entry in `FAMILIES` each.

    backbone: their class here. groups: registration order of the published class, by the first part of a name.
    empty: a state_dict to a model of its sizes, without values; CheckpointError naming the key that is missing or does
    not fit. export: a model's entries by name to those that the published code computes the same with. in_block: the
    order of a published block's modules, where it is another than ours.
    """

    backbone: type[Backbone]
    groups: tuple[str, ...]
    empty: Callable[[Mapping[str, Tensor], Known], Backbone]
    export: Callable[[Backbone, dict[str, Tensor]], dict[str, Tensor]]
    in_block: tuple[str, ...] = ()

    def place(self, name: str) -> tuple[int, ...]:
        """Sorts the names of the blocks' entries as published."""
        _, block, module = name.split(".", 2)
        return int(block), next(k for k, first in enumerate((*self.in_block, "")) if module.startswith(first))


@dataclass(frozen=True)
class Layout:
    """Sizes of a model. projectors: of each alignment head ("mlp", hidden width, output width), or iREPA's ("conv",
    kernel, output width). class_token, times, auxiliary_depth: as in `SiT.Config`. latent_head: whether the first stage
    of Self-Transcendence left its `projectors_final`.

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
    auxiliary_depth: int
    projectors: tuple[tuple[str, int, int], ...]
    latent_head: bool

    def settings(self) -> dict[str, Any]:
        """Fields of `SiT.Config`."""
        beside = ("head_channels", "null_row", "projectors", "latent_head")
        return {"name": "", **{key: value for key, value in vars(self).items() if key not in beside}}

    def check_head(self, kind: str) -> None:
        """Raises CheckpointError unless the output has as many channels as the latents, or twice as many."""
        if self.head_channels not in (self.in_channels, 2 * self.in_channels):
            raise CheckpointError(
                f"final_layer.linear.weight: {self.head_channels} output channels; an official {kind} on "
                f"{self.in_channels}-channel latents has {self.in_channels} or {2 * self.in_channels}"
            )


def read_layout(state: Mapping[str, Tensor], family: str, known: Known) -> Layout:
    """Sizes from shapes and from what else is known about the model.

    Raises CheckpointError naming the key that is missing or does not fit.
    """
    _, tokens, of_positions = shape(state, "pos_embed", 3)
    of_patches, channels, patch, _ = shape(state, "x_embedder.proj.weight", 4)
    rows, of_head = shape(state, "final_layer.linear.weight", 2)
    _, of_labels = shape(state, "y_embedder.embedding_table.weight", 2)
    # By majority, so that a single wrong shape is found to be the wrong one.
    width = Counter([of_positions, of_patches, of_head, of_labels]).most_common(1)[0][0]
    class_token = shape(state, "cls_projectors2.weight", 2)[1] if family == "reg" else 0
    patches = tokens - bool(class_token)
    grid = side(patches, family_hint(state, family) or f": not a model of family '{family}'")
    if rows % patch**2:
        raise CheckpointError(f"'final_layer.linear.weight' has {rows} rows, not a multiple of {patch}x{patch} patches")
    aligned = indices(state, r"projectors\.(\d+)\.(?:0|projection_layer)\.weight")
    depth, heads = read_depth(state), read_heads(state, width, known)
    classes, null_row, label_dropout = read_classes(state, known)
    auxiliary_depth = (known.encoder_depth or 0) if family == "internal_guidance" else 0
    if family == "internal_guidance" and not auxiliary_depth:
        raise CheckpointError(
            "a state_dict of internal guidance does not say on which block its 'final_layer_xr' stands; pass "
            f"encoder_depth, from 1 to {depth}"
        )
    return Layout(
        input_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        head_channels=rows // patch**2,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        num_classes=classes,
        null_row=null_row,
        label_dropout=label_dropout,
        qk_norm=OF_HEAD[0] in state,
        class_token=class_token,
        times=2 if family == "mean_flow" else 1,
        auxiliary_depth=auxiliary_depth,
        projectors=tuple(_head(state, f"projectors.{k}") for k in range(len(aligned))),
        latent_head=family == "self_transcendence" and "projectors_final.linear.weight" in state,
    )


def side(patches: int, hint: str = "") -> int:
    """Rows of a square of patches. Raises CheckpointError, which ends in the hint, for another number."""
    if math.isqrt(patches) ** 2 != patches:
        raise CheckpointError(f"'pos_embed' has places for {patches} patches, which is not a square{hint}")
    return math.isqrt(patches)


def read_depth(state: Mapping[str, Tensor]) -> int:
    """Number of blocks. Raises CheckpointError where one is missing in between."""
    blocks = indices(state, r"blocks\.(\d+)\.")
    for index in range(max(blocks, default=0) + 1):
        if index not in blocks:
            raise CheckpointError(f"missing key 'blocks.{index}.attn.qkv.weight': the state_dict has no such block")
    return max(blocks) + 1


def read_heads(state: Mapping[str, Tensor], width: int, known: Known) -> int:
    """Number of heads, off what has their width, else as known, else of the usual width: 64, or 72 at width 1152.

    Raises CheckpointError for a number that does not fit.
    """
    given = known.num_heads
    if given is not None and (given < 1 or width % given):
        raise CheckpointError(f"num_heads {given} does not divide width {width}; pass the number of attention heads")
    key = next((key for key in OF_HEAD if key in state), None)
    if key is None:
        if given is None:
            given = _usual_heads(width)
            known.assumed.append(f"num_heads={given} (heads of width {width // given})")
        return given
    of_head = state[key].shape[-1] if state[key].dim() else 0
    if not of_head or width % of_head or given not in (None, width // of_head):
        wanted = "" if given is None else f"num_heads={given}, but "
        makes = f", which makes {width / of_head:g} heads of width {width}; pass that or nothing" if of_head else ""
        raise CheckpointError(f"{wanted}'{key}' has shape {tuple(state[key].shape)}{makes}")
    return width // of_head


def read_classes(state: Mapping[str, Tensor], known: Known) -> tuple[int, bool, float]:
    """Number of classes, whether the table has a row for the null label, and the label dropout (0: never trained).

    What is not known is taken to be as usual: the last row is the null label. Raises CheckpointError for a number that
    does not fit.
    """
    labels, _ = shape(state, "y_embedder.embedding_table.weight", 2)
    classes = known.num_classes
    if classes is None:
        classes = labels if known.label_dropout == 0 else labels - 1
        if known.label_dropout is None:
            known.assumed.append(f"num_classes={classes} (the last of {labels} labels is the null label)")
    if classes not in (labels, labels - 1):
        raise CheckpointError(
            f"num_classes={classes}, but 'y_embedder.embedding_table.weight' has {labels} rows: it has one for each "
            f"class, and one more for the null label if there is one; pass num_classes={labels - 1} or {labels}"
        )
    null_row = classes < labels
    return classes, null_row, 0.1 if null_row and known.label_dropout != 0 else 0.0


def with_labels(model: B, null_row: bool) -> B:
    """The model with a label table like the checkpoint's: without a row for the null label where that has none."""
    model.y_embedder = LabelEmbedder(model.num_classes, model.hidden_size, null_row)
    return model


def family_hint(names: Iterable[str], family: str) -> str:
    """Which family to load instead, in brackets, if the first of the names that belongs to one alone says another."""
    groups = (name.split(".")[0] for name in names)
    owners = {group: owner for group, (owner, _) in OWN.items()}
    owners |= {"projectors_final": "self_transcendence", "feat_rope": "lightningdit"}
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
        earlier = len(indices(state, r"blocks\.(\d+)\."))
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


def shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"missing key '{name}'")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"'{name}' has shape {shape}, expected {dimensions} dimensions, none of them 0")
    return shape


def _head(state: Mapping[str, Tensor], name: str) -> tuple[str, int, int]:
    if (key := f"{name}.projection_layer.weight") in state:
        features, _, kernel, _ = shape(state, key, 4)
        return "conv", kernel, features
    return "mlp", shape(state, f"{name}.0.weight", 2)[0], shape(state, f"{name}.4.weight", 2)[0]


def indices(state: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(match[1]) for name in state if (match := re.match(pattern, name))}


def _usual_heads(width: int) -> int:
    if width != 1152 and width % 64:
        raise CheckpointError(f"width {width} is not a multiple of the usual head width 64; pass num_heads")
    return 16 if width == 1152 else width // 64
