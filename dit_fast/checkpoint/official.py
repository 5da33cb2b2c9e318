"""Checkpoints of the published codes, in and out, bit for bit: here those of networks built on SiT and DiT.

Names and shapes are those of the published modules (REPA, arXiv 2410.06940; SiT, 2401.08740; DiT, 2212.09748;
DiverseDiT, 2603.04239; REG, 2507.01467; mean flow, 2505.13447, as in the PyTorch code; SRA on SiT, 2505.02831;
Self-Transcendence, 2601.07773; internal guidance, 2512.24176). Other networks have a file each
(`families.FAMILIES`).
What a state_dict does not say must be given (wiring of the long skips) or is taken to be as usual and logged in one
line (number of heads, a null label in the label table).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_fast import files
from dit_fast.checkpoint.families import FAMILIES, NAMES, official_names
from dit_fast.checkpoint.layout import Known, Layout, family_hint, listed_heads, read_layout, rename_legacy, with_labels
from dit_fast.checkpoint.official_time import reversed_state, widened_state
from dit_fast.diffusion.conversions import Prediction
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.methods.base import NORM, NORM_EPS
from dit_fast.models import Backbone
from dit_fast.models.dit import DiT
from dit_fast.models.reversed_sit import ReversedSiT
from dit_fast.models.sit import SiT
from dit_fast.nn.batch_norm import BatchNorm
from dit_fast.nn.projector import ConvProjector, LatentHead, SelfProjector, projector
from dit_fast.published import read_state

logger = logging.getLogger("dit_fast")

LABEL_DROPOUT = ("label_dropout", "class_dropout_prob", "cfg_prob")  # its names in headers and training arguments
PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine", "vp": "vp"}  # by REPA's `path_type` or SiT's


@dataclass(frozen=True)
class Origin:
    """Where a model's weights came from: what its export needs to give back the same file."""

    family: str
    dtypes: Mapping[str, torch.dtype]
    ordered: bool  # False: the file format kept no order
    listed: bool = True  # False: its lone alignment head lay in no list


def load_official(
    source: str | Path | Mapping[str, Any],
    family: str,
    num_heads: int | None = None,
    skip_wiring: str | None = None,
    encoder_depth: int | None = None,
    weights: str = "ema",
    num_classes: int | None = None,
    in_context_start: int | None = None,
) -> Backbone:
    """A model, in eval mode, with published weights.

    source: a state_dict, a training checkpoint {model, ema, opt, args, steps}, or the path of a `.pt` or `.safetensors`
    file. family: "repa", "irepa", "repa_e", "sit", "dit", "diversedit", "reg", "mean_flow", "sra", "internal_guidance",
    "self_transcendence" (of either stage), "lightningdit" (norm, MLP, rotary positions and shifts are read off the
    keys), "jit" or "ddt". "sit", "lightningdit" and "ddt" models take our t and return our v, "jit" models take our t
    and return clean data; "dit" models take steps t int64 and return noise and logits of the variance [N, 2C, H, W]
    (samplers "ddpm", "ddim"). `sample` guides three channels of "sit", "lightningdit" and "dit" models by default, as
    the released samplers do. "reg" models take and return {"image", "class_token"}, "mean_flow" models take t [N, 2].
    Alignment heads come as `model.projectors`, SRA's as `model.ap_head`. A "repa_e" model takes latents normalised by
    `model.bn.running` (`model.bn` itself takes the batch's statistics, in eval mode too, and moves the running ones);
    their autoencoder is no part of "model" or "ema" in the file.
    Sizes are read off the shapes. num_heads is read off the query norm or the rotary tables where there are any, else
    off the file's header or arguments; it defaults to head width 64 (72 at width 1152), which is logged.
    num_classes: rows of the label table without the null label's; default: what the file's header or arguments say,
    else one less than the table has, which is logged. A model whose table has no row for the null label, or that was
    trained with label dropout 0 according to the file, has null_label -1, and guidance is refused.
    skip_wiring: "input" or "output", for "diversedit": both have the same keys and shapes, so it must be told.
    encoder_depth: for "ddt", the number of its encoder's blocks; for "internal_guidance", whose models return two
    velocities, the second from that block (from 1); both unless the file says it; and for old REPA files that name
    their later blocks `decoder_blocks`. For all others it must be one of the blocks, and nothing depends on it.
    in_context_start: for "jit", the first block, from 0, with its tokens of the label, unless the file says it. A "ddt"
    model takes images of every size, as its entries tell none.
    weights: "ema" or "model", of a training checkpoint.
    `model.path` is the path that the file's header or arguments name (`path_type`), and `model.prediction` what a
    header says; `sample` follows both.
    Weights are kept in fp32, or fp64 if the source has any; `export_official` returns the source's dtypes.
    Raises CheckpointError naming the key (missing, extra, wrong shape) or the argument that is needed; ConfigError for
    a family that is not supported.
    """
    _check_family(family)
    state, facts, ordered = read_state(source, weights)
    state = rename_legacy(state, _whole("encoder_depth", encoder_depth))
    tapped = facts.get("encoder_depth") if encoder_depth is None else encoder_depth
    state, listed = listed_heads(state, family)
    recorded = facts.get("skip_wiring")
    wiring = _wiring(family, skip_wiring, recorded if isinstance(recorded, str) else None)
    dropout = next((facts[name] for name in LABEL_DROPOUT if facts.get(name) is not None), None)
    known = Known(
        num_heads=_whole("num_heads", facts.get("num_heads") if num_heads is None else num_heads),
        num_classes=_whole("num_classes", facts.get("num_classes") if num_classes is None else num_classes),
        label_dropout=None if dropout is None else _probability(dropout),
        skip_wiring=wiring,
        encoder_depth=_whole("encoder_depth", tapped),
        in_context_start=_whole(
            "in_context_start", facts.get("in_context_start") if in_context_start is None else in_context_start
        ),
    )
    try:
        with torch.device("meta"):
            model = (FAMILIES[family].empty if family in FAMILIES else partial(_empty_model, family))(state, known)
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's shapes and num_heads make no model: {error}") from error
    if encoder_depth is not None and not 1 <= (known.encoder_depth or 0) <= model.depth:
        raise CheckpointError(f"encoder_depth={encoder_depth} is not one of the checkpoint's blocks 1..{model.depth}")
    if in_context_start is not None and family != "jit":
        raise CheckpointError(f"in_context_start={in_context_start} is for family 'jit', not '{family}'; drop it")
    if known.assumed:
        taken = " and ".join(known.assumed)
        logger.warning("the checkpoint does not say, so %s; pass other values if that is wrong", taken)
    _compare(model, state, family)
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in state.values()) else torch.float32
    tensors = {
        name: tensor.detach().to(dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        for name, tensor in state.items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"'{name}' holds NaN or Inf; take a checkpoint from before the training diverged")
    model.load_state_dict(tensors, assign=True)
    model.path = PATHS.get(str(facts.get("path_type")).lower())
    if not ordered and facts.get("prediction") in get_args(Prediction):  # not of arguments, which know other signs
        model.prediction = facts["prediction"]
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    cast(Any, model).official_source = Origin(family, dtypes, ordered, listed)
    return model.eval()


def export_official(model: nn.Module, family: str | None = None) -> dict[str, Tensor]:
    """The state_dict that the published code of a family loads: CPU copies, in its key order.

    family defaults to where the weights came from, else to "dit" with a learned variance, "reg" with a class token,
    "mean_flow" with two times, "internal_guidance" with an auxiliary head, "sra" and "repa_e" with what is theirs,
    "diversedit" with long skips and "repa" without; another network has its own. A model that `load_official` made
    gives back the source's bits, key order and dtypes. A model of ours exported as "sit" or "lightningdit" gets the
    reversed time and sign folded into its weights (exact up to rounding), as "sit" also an 8-channel style head
    whose second half is zero.
    Raises CheckpointError if the family cannot hold the model, naming the key, and for what is no model of ours.
    """
    if not isinstance(model, Backbone):
        raise CheckpointError(f"a {type(model).__name__} is no model of dit_fast.models; pass the model that it wraps")
    sit = cast(SiT, model)
    source: Origin | None = getattr(model, "official_source", None)
    if family is None:
        family = source.family if source else _natural_family(sit)
    _check_family(family)
    if (other := _other_family(model)) != (family if family in FAMILIES else None):
        raise CheckpointError(
            f"family '{family}' cannot hold a {type(model).__name__}" + f"; use family='{other}'" * bool(other)
        )
    names = official_names(model, family)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if (family == "dit") != sit.learns_variance:
        raise CheckpointError(f"family '{family}' cannot hold a {type(model).__name__}; only 'dit' learns a variance")
    if other:
        state = FAMILIES[other].export(sit, state)
    elif family == "sit" and not isinstance(model, ReversedSiT):
        state = widened_state(reversed_state(state), sit.config.patch_size)
    elif family != "sit" and isinstance(model, ReversedSiT):
        raise CheckpointError(f"final_layer.linear.weight: an official SiT head cannot be exported as '{family}'")
    if source and source.ordered and source.family == family and set(source.dtypes) == set(names):
        names = list(source.dtypes)
    dtypes: Mapping[str, torch.dtype] = source.dtypes if source else {}
    result = {name: state[name].to(dtypes.get(name, state[name].dtype), copy=True) for name in names}
    if family != "self_transcendence" or (source and source.family == family and source.listed):
        return result
    if any(name.startswith("projectors.1.") for name in names):
        raise CheckpointError("'projectors.1': the published code has one head, in no list; keep our checkpoint")
    return {name.replace("projectors.0.", "projectors.", 1): tensor for name, tensor in result.items()}


def save_official(
    model: nn.Module, path: str | Path, family: str | None = None, about: Mapping[str, str] | None = None
) -> None:
    """Writes `export_official(model, family)` as `.pt` (bare state_dict) or `.safetensors`, replacing the file at once.

    A `.safetensors` file also says num_heads, num_classes, label_dropout, skip_wiring, encoder_depth,
    in_context_start, path_type and prediction in its header, as far as the model has them, and `load_official` reads
    them there; about: what its header says besides.
    """
    path = Path(path)
    state = export_official(model, family)
    if path.suffix not in (".pt", ".safetensors"):
        raise ConfigError(f"{path}: the name must end in .pt or .safetensors")
    with files.replacing(path) as file:
        if path.suffix == ".pt":
            torch.save(state, file)
        else:
            config = cast(SiT, model).config
            facts = ("skip_wiring", "num_heads", "num_classes", "label_dropout", "encoder_depth", "in_context_start")
            known = {name: str(getattr(config, name)) for name in facts if hasattr(config, name)}
            header = {**(about or {}), "format": "pt", **known}
            if getattr(config, "auxiliary_depth", 0):
                header["encoder_depth"] = str(config.auxiliary_depth)
            said = {"path_type": cast(SiT, model).path, "prediction": cast(SiT, model).prediction}
            header |= {name: value for name, value in said.items() if value}
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, file.name, metadata=header)


def _check_family(family: str) -> None:
    if family not in NAMES:
        raise ConfigError(f"checkpoint family '{family}' is not supported; supported at present: {', '.join(NAMES)}")


def _other_family(model: nn.Module) -> str | None:
    """The family of a network that is not SiT's."""
    return next((name for name, family in FAMILIES.items() if isinstance(model, family.backbone)), None)


def _natural_family(model: SiT) -> str:
    if other := _other_family(model):
        return other
    if isinstance(model, ReversedSiT):
        return "sit"
    if model.learns_variance:
        return "dit"
    if model.class_token or model.times == 2:
        return "reg" if model.class_token else "mean_flow"
    if model.config.auxiliary_depth:
        return "internal_guidance"
    if hasattr(model, "ap_head"):
        return "sra"
    if hasattr(model, NORM):
        return "repa_e"
    if model.config.skip_wiring != "off":
        return "diversedit"
    return "irepa" if any(isinstance(head, ConvProjector) for head in getattr(model, "projectors", ())) else "repa"


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several values
        raise CheckpointError(f"{name}={str(value)[:50]!r}, as given or in the checkpoint, is not a number") from None


def _probability(value: Any) -> float:
    number = _number("label dropout", value)
    if not 0 <= number <= 1:
        raise CheckpointError(f"label dropout={value!r} in the checkpoint is no probability; correct it there")
    return number


def _whole(name: str, value: Any) -> int | None:
    if value is None:
        return None
    number = _number(name, value)
    if isinstance(value, bool) or not number.is_integer():
        raise CheckpointError(f"{name}={value!r} must be a whole number; pass {name}=")
    return int(number)


def _wiring(family: str, given: str | None, recorded: str | None) -> str:
    if family != "diversedit":
        if given not in (None, "off"):
            raise CheckpointError(
                f"skip_wiring='{given}': family '{family}' has no long skips; use family='diversedit'"
            )
        return "off"
    if given and recorded and given != recorded:
        raise CheckpointError(f"skip_wiring='{given}', but the file's header says '{recorded}'; pass that or nothing")
    wiring = given or recorded
    if wiring not in ("input", "output"):
        raise CheckpointError(
            "a DiverseDiT state_dict does not say how its long skips are wired (both wirings have the same keys and "
            "shapes, and the wrong one gives broken samples); pass skip_wiring='input' (paper, Eq. 8) or 'output' "
            "(released code)"
        )
    return wiring


def _empty_model(family: str, state: Mapping[str, Tensor], known: Known) -> SiT:
    layout = read_layout(state, family, known)
    if family == "dit":
        return with_labels(_empty_dit(layout), layout.null_row)
    config = SiT.Config(**layout.settings(), skip_wiring=cast(Any, known.skip_wiring))
    if family == "sit":
        layout.check_head("SiT")
        return with_labels(ReversedSiT(config, layout.head_channels), layout.null_row)
    if layout.head_channels != layout.in_channels:
        raise CheckpointError(
            f"final_layer.linear.weight: {layout.head_channels} output channels, but family '{family}' has as many as "
            f"the latents ({layout.in_channels}); an official SiT or DiT file needs family='sit' or family='dit'"
        )
    model = with_labels(SiT(config), layout.null_row)
    if family == "sra":
        model.add_head("ap_head", SelfProjector(layout.hidden_size))
    if family == "repa_e":
        model.add_head(NORM, BatchNorm(layout.in_channels, NORM_EPS, affine=False))
    for kind, size, features in layout.projectors:
        if kind == "conv":
            model.add_projector(ConvProjector(layout.hidden_size, features, model.grid, kernel=size))
        else:
            model.add_projector(projector(layout.hidden_size, size, features))
    if layout.latent_head:
        model.add_head("projectors_final", LatentHead(layout.hidden_size, layout.patch_size**2 * layout.in_channels))
    return model


def _empty_dit(layout: Layout) -> DiT:
    if layout.head_channels != 2 * layout.in_channels:
        raise CheckpointError(
            f"final_layer.linear.weight: {layout.head_channels} output channels; a DiT with a learned variance on "
            f"{layout.in_channels}-channel latents has {2 * layout.in_channels}"
        )
    model = DiT(DiT.Config(**layout.settings()))
    model.cfg_channels = "first_three"
    return model


def _compare(model: nn.Module, state: Mapping[str, Tensor], family: str) -> None:
    expected = model.state_dict()
    for name in expected:
        if name not in state:
            raise CheckpointError(
                f"missing key '{name}': not a complete checkpoint of family '{family}'{family_hint(state, family)}"
            )
    for name, tensor in state.items():
        if name not in expected:
            raise CheckpointError(
                f"extra key '{name}': family '{family}' has no such entry here{family_hint([name], family)}"
            )
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"'{name}' has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)} from the other keys"
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            kind = "floating point" if expected[name].is_floating_point() else "whole numbers"
            raise CheckpointError(f"'{name}' is {tensor.dtype}, expected {kind}")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "on the meta device, without values" if tensor.is_meta else f"stored as {tensor.layout}"
            raise CheckpointError(f"'{name}' is {kind}; save a checkpoint of dense tensors with values")
